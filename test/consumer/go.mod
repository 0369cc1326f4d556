module example.com/consumer

go 1.26.0

require (
	github.com/ringfence/ringfence v0.0.0
	golang.org/x/sys v0.49.0
)

require golang.org/x/arch v0.32.0 // indirect

replace github.com/ringfence/ringfence => ../..
