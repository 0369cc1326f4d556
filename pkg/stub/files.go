package stub

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/memmap"
)

// maxFiles is how many files the zygote holds before those not used for longest
// are closed. Their mappings stay.
const maxFiles = 512

// files are the files that the zygote holds.
type files struct {
	zygote *Zygote

	mu     sync.Mutex
	byFile map[memmap.File]*handle
	clock  uint64
	// unclosed are files that are closed with the next request.
	unclosed span
}

// span is one of descriptors without gaps, all zero if it is empty.
type span struct{ first, last uint32 }

// arg returns s as requests have it.
func (s span) arg() uint64 { return uint64(s.last)<<32 | uint64(s.first) }

// handle is a file in the zygote's table of descriptors.
type handle struct {
	num      int
	dev, ino uint64
	users    int
	lastUse  uint64
	dropped  bool
}

// WithFile calls f with the number that file has in every stub of z. The number
// is good during the call only.
func (z *Zygote) WithFile(file memmap.File, f func(num int) error) error {
	h, err := z.files.acquire(file)
	if err != nil {
		return err
	}
	defer z.files.release(h)
	return f(h.num)
}

// Hold hands file to the stubs until release is called, and returns the number
// that it has there.
func (z *Zygote) Hold(file memmap.File) (num int, release func(), err error) {
	h, err := z.files.acquire(file)
	if err != nil {
		return 0, nil, err
	}
	return h.num, func() {
		z.files.forget(file, h)
		z.files.release(h)
	}, nil
}

// forget makes the last user of h close it.
func (fs *files) forget(file memmap.File, h *handle) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.byFile[file] == h {
		fs.drop(file, h)
	}
}

func (fs *files) acquire(file memmap.File) (*handle, error) {
	fd := file.FD()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("fstat of the file to map, descriptor %d: %w", fd, err)
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.clock++
	h := fs.byFile[file]
	if h != nil && (h.dev != st.Dev || h.ino != st.Ino) {
		// Once the last reference is gone the same File may mean another one. While
		// we hold the old one, that has another inode number.
		fs.drop(file, h)
		h = nil
	}
	if h == nil {
		if len(fs.byFile) >= maxFiles {
			fs.evict(maxFiles / 2)
		}
		rights := unix.UnixRights(fd)
		num, err := fs.zygote.request(opPutFile, fs.unclosed.arg(), rights)
		if err == nil || err == unix.EBADF { // it has got the request
			fs.unclosed = span{}
		}
		if err == unix.EBADF && len(fs.byFile) > 0 {
			// The table is full: the kernel leaves the descriptor out.
			fs.evict(0)
			fs.flush()
			num, err = fs.zygote.request(opPutFile, 0, rights)
		}
		if err == unix.EBADF {
			err = unix.EMFILE
		}
		if err != nil {
			return nil, fmt.Errorf("handing the file to map, descriptor %d, to the stubs: %w%s", fd, err, hint(err))
		}
		h = &handle{num: num, dev: st.Dev, ino: st.Ino}
		if fs.byFile == nil {
			fs.byFile = make(map[memmap.File]*handle)
		}
		fs.byFile[file] = h
	}
	h.users++
	h.lastUse = fs.clock
	return h, nil
}

func (fs *files) release(h *handle) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	h.users--
	if h.users == 0 && h.dropped {
		fs.close(h)
	}
}

// drop forgets h, which file has, and closes it as soon as nobody uses it.
func (fs *files) drop(file memmap.File, h *handle) {
	delete(fs.byFile, file)
	h.dropped = true
	if h.users == 0 {
		fs.close(h)
	}
}

// close closes h, or, to save a wake-up, what was to be closed before it. It can only
// fail if the zygote is gone, which other calls say.
func (fs *files) close(h *handle) {
	num := uint32(h.num)
	if fs.unclosed.first != 0 && num == fs.unclosed.last+1 {
		fs.unclosed.last = num
		return
	}
	if fs.unclosed.first != 0 {
		fs.zygote.tell(opDropFiles, fs.unclosed.arg())
	}
	fs.unclosed = span{num, num}
}

// flush closes what is still to be closed, and returns when everything is.
func (fs *files) flush() {
	if fs.unclosed.first != 0 {
		fs.zygote.request(opCloseFiles, fs.unclosed.arg(), nil)
		fs.unclosed = span{}
	}
}

// evict drops the files that were not used for longest until keep are left,
// those in use aside.
func (fs *files) evict(keep int) {
	unused := slices.DeleteFunc(slices.Collect(maps.Keys(fs.byFile)), func(f memmap.File) bool { return fs.byFile[f].users > 0 })
	slices.SortFunc(unused, func(a, b memmap.File) int {
		return cmp.Compare(fs.byFile[a].lastUse, fs.byFile[b].lastUse)
	})
	victims := unused[:min(len(unused), len(fs.byFile)-keep)]
	// Those in a row are closed with one request.
	slices.SortFunc(victims, func(a, b memmap.File) int {
		return cmp.Compare(fs.byFile[a].num, fs.byFile[b].num)
	})
	for _, file := range victims {
		fs.drop(file, fs.byFile[file])
	}
}

// DropFiles closes all files that are not in use: nothing of theirs is held when
// their mappings are gone. Files that are mapped again are handed over again.
func (z *Zygote) DropFiles() {
	z.files.mu.Lock()
	defer z.files.mu.Unlock()
	z.files.evict(0)
	z.files.flush()
}
