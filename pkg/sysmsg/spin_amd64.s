#include "textflag.h"

// func spinWhile(p *atomic.Uint32, v, n uint32) uint32
TEXT ·spinWhile(SB),NOSPLIT,$0-20
	MOVQ p+0(FP), DI
	MOVL v+8(FP), SI
	MOVL n+12(FP), CX
again:
	MOVL (DI), AX
	CMPL AX, SI
	JNE  done
	SUBL $1, CX
	JLE  done
	PAUSE
	JMP  again
done:
	MOVL AX, ret+16(FP)
	RET
