package platformtest

import (
	"slices"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// textFile is the file with all programs.
type textFile struct {
	*file
	offsets map[program]uint64
}

// newTextFile copies every program into a memory file.
func newTextFile() (*textFile, error) {
	var image []byte
	tf := &textFile{offsets: make(map[program]uint64)}
	for _, p := range slices.Concat(allPrograms(), archPrograms()) {
		image = append(image, make([]byte, -len(image)&63)...)
		tf.offsets[p] = uint64(len(image))
		image = append(image, code(p)...)
		image = append(image, programEnd[:]...)
	}
	size, _ := hostarch.PageRoundUp(uint64(len(image)))
	f, err := newFile(size)
	if err != nil {
		return nil, err
	}
	copy(f.data, image)
	tf.file = f
	return tf, nil
}

// addr returns the address of prog in every space that has the programs mapped.
func (tf *textFile) addr(prog program) uintptr {
	off, ok := tf.offsets[prog]
	if !ok {
		panic("platformtest: the program is missing in allPrograms or archPrograms")
	}
	return uintptr(textBase) + uintptr(off)
}
