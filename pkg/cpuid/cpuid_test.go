package cpuid

import (
	"context"
	"testing"
)

func TestFromContext(t *testing.T) {
	ctx := context.Background()
	if FromContext(ctx) != Native() {
		t.Error("no FeatureSet in the context: not Native")
	}
	fs := New(Policy{})
	if FromContext(context.WithValue(ctx, CtxFeatureSet, fs)) != fs {
		t.Error("the context's FeatureSet is not returned")
	}
	if FromContext(context.WithValue(ctx, CtxFeatureSet, (*FeatureSet)(nil))) != Native() {
		t.Error("a nil FeatureSet is returned")
	}
}
