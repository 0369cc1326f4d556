package platformtest

import (
	"slices"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// batchSubjects are run where AddressSpaces are BatchMappers.
var batchSubjects = []subject{
	{"MapFiles", testMapFiles},
	{"Mapped", testMapFilesMapped},
	{"StopsOtherContext", testMapFilesStopsOtherContext},
	{"Error", testMapFilesError},
}

// mapsBatches reports whether AddressSpaces are BatchMappers.
func (t *T) mapsBatches() bool {
	_, ok := t.newBareSpace().as.(platform.BatchMapper)
	return ok
}

// batch maps ms, and holds the files until unbatch.
func (sp *space) batch(ms []platform.FileMapping) error {
	for _, m := range ms {
		m.File.IncRef(m.Range)
	}
	return sp.as.(platform.BatchMapper).MapFiles(ms)
}

// unbatch unmaps what batch was given.
func (sp *space) unbatch(ms []platform.FileMapping) {
	for _, m := range ms {
		sp.as.Unmap(m.Addr, m.Range.Length())
		m.File.DecRef(m.Range)
	}
}

// More mappings than a platform may make at a time, of several files, with all
// kinds of access; some replace others of the same batch.
func testMapFiles(t *T) {
	sp := t.newSpace()
	files := []*file{t.newFile(dataPages * pageSize), t.newFile(dataPages * pageSize), sp.data}
	for i, f := range files {
		f.number(uint64(i))
	}
	const n = 300
	addr := func(i int) hostarch.Addr { return dataBase + hostarch.Addr(i)*2*pageSize }
	off := func(i int) uint64 { return uint64(i) * 7 % dataPages * pageSize }
	access := []hostarch.AccessType{hostarch.Read, hostarch.ReadWrite, hostarch.ReadExec}
	var ms []platform.FileMapping
	for i := range n {
		m := platform.FileMapping{
			Addr: addr(i), File: files[i/3%3], Range: fileRange(off(i), pageSize), Access: access[i%3], Precommit: i%4 == 0,
		}
		if i%5 == 0 {
			// What comes first must not be what stays.
			first := m
			first.File, first.Access = files[(i/3+1)%3], hostarch.ReadWrite
			ms = append(ms, first)
		}
		ms = append(ms, m)
	}
	if err := sp.batch(ms); err != nil {
		t.Fatalf("MapFiles of %d mappings: %v", len(ms), err)
	}
	th := sp.newThread(progLoad)
	for i := range n {
		th.mustLoad(addr(i), uint64(i/3%3)<<32|off(i)/pageSize)
	}
	for i := range 6 {
		if access[i%3].Write {
			th.mustStore(addr(i)+8, uint64(i))
			continue
		}
		th.fault(fault{addr: addr(i), at: hostarch.Write, code: linux.SEGV_ACCERR}, progStore, uint64(addr(i)), 1)
	}
	th.fault(fault{addr: addr(1) + pageSize, at: hostarch.Read}, progLoad, uint64(addr(1)+pageSize))
	if err := sp.as.(platform.BatchMapper).MapFiles(nil); err != nil {
		t.Errorf("MapFiles of nothing: %v", err)
	}
	sp.unbatch(ms)
	th.fault(fault{addr: addr(1), at: hostarch.Read}, progLoad, uint64(addr(1)))
}

// What is mapped gets another access, along with what is mapped anew.
func testMapFilesMapped(t *T) {
	sp := t.newSpace()
	sp.data.number(0)
	const n = 12
	access := []hostarch.AccessType{hostarch.Read, hostarch.ReadWrite, hostarch.ReadExec}
	mapping := func(i, round int) platform.FileMapping {
		return platform.FileMapping{
			Addr: dataBase + hostarch.Addr(i)*2*pageSize, File: sp.data, Range: fileRange(uint64(i)*pageSize, pageSize),
			Access: access[(i+round)%3], Mapped: round > 0 && i%4 != round%4, Precommit: i%5 == 0,
		}
	}
	th := sp.newThread(progLoad)
	for round := range 4 {
		var ms []platform.FileMapping
		for i := range n {
			ms = append(ms, mapping(i, round))
		}
		if err := sp.batch(ms); err != nil {
			t.Fatalf("MapFiles, round %d: %v", round, err)
		}
		for i, m := range ms {
			th.mustLoad(m.Addr, uint64(i))
			if m.Access.Write {
				th.mustStore(m.Addr+8, uint64(round))
			} else {
				th.fault(fault{addr: m.Addr + 8, at: hostarch.Write, code: linux.SEGV_ACCERR}, progStore, uint64(m.Addr+8), 1)
			}
		}
		defer sp.unbatch(ms)
	}
}

// A batch that takes access away has done so when it returns.
func testMapFilesStopsOtherContext(t *T) {
	sp := t.newSpace()
	var ms []platform.FileMapping
	for i := range uint64(8) {
		ms = append(ms, platform.FileMapping{Addr: dataBase + hostarch.Addr(i*pageSize), File: sp.data, Range: fileRange(i*pageSize, pageSize), Access: hostarch.Read})
	}
	for range 10 {
		sp.mapData(8, hostarch.ReadWrite)
		th, events := sp.spinner(progWriteSpin, uint64(dataBase+5*pageSize))
		t.beating(sp.data, beatOff)
		if err := sp.batch(ms); err != nil {
			t.Fatalf("MapFiles: %v", err)
		}
		th.mustStop(events, 5*pageSize, fault{addr: dataBase + 5*pageSize, at: hostarch.Write, code: linux.SEGV_ACCERR})
		sp.unbatch(ms)
		th.release()
	}
}

// A mapping that the host refuses is an error, and what it is not about can be used
// as before.
func testMapFilesError(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progLoad)
	th.mustStore(dataBase, 33)
	good := platform.FileMapping{Addr: dataBase + pageSize, File: sp.data, Range: fileRange(0, pageSize), Access: hostarch.Read}
	bad := good
	bad.Addr, bad.File = dataBase+2*pageSize, badFile{sp.data}
	for i := range 3 {
		ms := []platform.FileMapping{good, good}
		ms = slices.Insert(ms, i, bad)
		err := sp.batch(ms)
		if err == nil {
			t.Fatalf("MapFiles of a file with a closed descriptor succeeds")
		}
		if !isErrno(err) {
			t.Errorf("MapFiles of a file with a closed descriptor: %v wraps no errno", err)
		}
		th.mustLoad(dataBase, 33)
		sp.unbatch(ms)
		th.fault(fault{addr: good.Addr, at: hostarch.Read}, progLoad, uint64(good.Addr))
	}
	ms := []platform.FileMapping{good}
	if err := sp.batch(ms); err != nil {
		t.Fatalf("MapFiles after an error: %v", err)
	}
	th.mustLoad(good.Addr, 33)
	sp.unbatch(ms)
}
