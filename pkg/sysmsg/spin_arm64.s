#include "textflag.h"

// func spinWhile(p *atomic.Uint32, v, n uint32) uint32
TEXT ·spinWhile(SB),NOSPLIT,$0-20
	MOVD p+0(FP), R0
	MOVWU v+8(FP), R1
	MOVW n+12(FP), R2
again:
	LDARW (R0), R3
	CMPW R1, R3
	BNE  done
	SUBW $1, R2
	CMPW $0, R2
	BLE  done
	YIELD
	B    again
done:
	MOVW R3, ret+16(FP)
	RET
