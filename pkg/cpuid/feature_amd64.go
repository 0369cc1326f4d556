package cpuid

// Feature is one feature bit of CPUID: 32 times the index in words, plus the
// number of the bit.
type Feature uint32

const numWords = 8

// Registers of CPUID's answer.
const (
	regEAX = iota
	regEBX
	regECX
	regEDX
)

// words are the registers that hold features. indexed says that the leaf has
// subleaves.
var words = [numWords]struct {
	leaf, subleaf uint32
	reg           int
	indexed       bool
}{
	{leafFeatures, 0, regEDX, false},
	{leafFeatures, 0, regECX, false},
	{leafExtFeatures, 0, regEBX, true},
	{leafExtFeatures, 0, regECX, true},
	{leafExtFeatures, 0, regEDX, true},
	{leafExtFeatures, 1, regEAX, true},
	{leafExtended, 0, regEDX, false},
	{leafExtended, 0, regECX, false},
}

// The features that Ringfence asks for, or that a policy may want to hide.
const (
	FeatureFPU  Feature = 0*32 + 0
	FeatureTSC  Feature = 0*32 + 4
	FeatureMMX  Feature = 0*32 + 23
	FeatureFXSR Feature = 0*32 + 24
	FeatureSSE  Feature = 0*32 + 25
	FeatureSSE2 Feature = 0*32 + 26

	FeaturePCLMULQDQ  Feature = 1*32 + 1
	FeatureMONITOR    Feature = 1*32 + 3
	FeatureVMX        Feature = 1*32 + 5
	FeatureFMA        Feature = 1*32 + 12
	FeaturePCID       Feature = 1*32 + 17
	FeatureAES        Feature = 1*32 + 25
	FeatureXSAVE      Feature = 1*32 + 26
	FeatureOSXSAVE    Feature = 1*32 + 27
	FeatureAVX        Feature = 1*32 + 28
	FeatureF16C       Feature = 1*32 + 29
	FeatureRDRAND     Feature = 1*32 + 30
	FeatureHypervisor Feature = 1*32 + 31

	FeatureFSGSBASE   Feature = 2*32 + 0
	FeatureHLE        Feature = 2*32 + 4
	FeatureAVX2       Feature = 2*32 + 5
	FeatureERMS       Feature = 2*32 + 9
	FeatureRTM        Feature = 2*32 + 11
	FeatureAVX512F    Feature = 2*32 + 16
	FeatureAVX512DQ   Feature = 2*32 + 17
	FeatureRDSEED     Feature = 2*32 + 18
	FeatureAVX512IFMA Feature = 2*32 + 21
	FeatureAVX512CD   Feature = 2*32 + 28
	FeatureSHANI      Feature = 2*32 + 29
	FeatureAVX512BW   Feature = 2*32 + 30
	FeatureAVX512VL   Feature = 2*32 + 31

	FeatureAVX512VBMI      Feature = 3*32 + 1
	FeaturePKU             Feature = 3*32 + 3
	FeatureOSPKE           Feature = 3*32 + 4
	FeatureWAITPKG         Feature = 3*32 + 5
	FeatureAVX512VBMI2     Feature = 3*32 + 6
	FeatureSHSTK           Feature = 3*32 + 7
	FeatureVAES            Feature = 3*32 + 9
	FeatureVPCLMULQDQ      Feature = 3*32 + 10
	FeatureAVX512VNNI      Feature = 3*32 + 11
	FeatureAVX512BITALG    Feature = 3*32 + 12
	FeatureAVX512VPOPCNTDQ Feature = 3*32 + 14
	FeatureLA57            Feature = 3*32 + 16
	FeatureRDPID           Feature = 3*32 + 22

	FeatureAVX5124VNNIW       Feature = 4*32 + 2
	FeatureAVX5124FMAPS       Feature = 4*32 + 3
	FeatureFSRM               Feature = 4*32 + 4
	FeatureUINTR              Feature = 4*32 + 5
	FeatureAVX512VP2INTERSECT Feature = 4*32 + 8
	FeatureIBT                Feature = 4*32 + 20
	FeatureAMXBF16            Feature = 4*32 + 22
	FeatureAVX512FP16         Feature = 4*32 + 23
	FeatureAMXTile            Feature = 4*32 + 24
	FeatureAMXInt8            Feature = 4*32 + 25

	FeatureAVXVNNI    Feature = 5*32 + 4
	FeatureAVX512BF16 Feature = 5*32 + 5
	FeatureAMXFP16    Feature = 5*32 + 21
	FeatureAVXIFMA    Feature = 5*32 + 23

	FeatureSyscall Feature = 6*32 + 11
	FeatureNX      Feature = 6*32 + 20
	FeatureGBPages Feature = 6*32 + 26
	FeatureRDTSCP  Feature = 6*32 + 27
	FeatureLM      Feature = 6*32 + 29

	FeatureSVM    Feature = 7*32 + 2
	FeatureSSE4A  Feature = 7*32 + 6
	FeatureXOP    Feature = 7*32 + 11
	FeatureFMA4   Feature = 7*32 + 16
	FeatureMWAITX Feature = 7*32 + 29
)

// needs maps a feature to those that cannot work without it.
var needs = map[Feature][]Feature{
	FeatureXSAVE: {FeatureOSXSAVE, FeatureAVX, FeaturePKU, FeatureAMXTile},
	FeatureAVX:   {FeatureAVX2, FeatureFMA, FeatureF16C, FeatureVAES, FeatureVPCLMULQDQ, FeatureXOP, FeatureFMA4, FeatureAVXVNNI, FeatureAVXIFMA},
	FeatureAVX2:  {FeatureAVX512F},
	FeatureAVX512F: {
		FeatureAVX512DQ, FeatureAVX512IFMA, FeatureAVX512CD, FeatureAVX512BW, FeatureAVX512VL, FeatureAVX512VBMI,
		FeatureAVX512VBMI2, FeatureAVX512VNNI, FeatureAVX512BITALG, FeatureAVX512VPOPCNTDQ,
		FeatureAVX5124VNNIW, FeatureAVX5124FMAPS, FeatureAVX512VP2INTERSECT, FeatureAVX512FP16, FeatureAVX512BF16,
	},
	FeatureAMXTile: {FeatureAMXBF16, FeatureAMXInt8, FeatureAMXFP16},
	FeaturePKU:     {FeatureOSPKE},
}
