package mm

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// ReadMaps returns the contents of /proc/PID/maps (proc_pid_maps(5)).
func (mm *MemoryManager) ReadMaps() string {
	mm.mappingMu.RLock()
	defer mm.mappingMu.RUnlock()
	var b strings.Builder
	for p := (pos{}); ; p = mm.vmas.next(p) {
		seg := mm.vmas.at(p)
		if seg == nil {
			return b.String()
		}
		share := byte('s')
		if seg.v.private {
			share = 'p'
		}
		var dev, ino uint64
		name := seg.v.hint
		if seg.v.id != nil {
			dev, ino, name = seg.v.id.DeviceID(), seg.v.id.InodeID(), seg.v.id.MappedName()
		} else if seg.v.stack {
			name = "[stack]"
		}
		line := fmt.Sprintf("%08x-%08x %s%c %08x %02x:%02x %d", uint64(seg.Start), uint64(seg.End),
			seg.v.perms, share, seg.v.off, unix.Major(dev), unix.Minor(dev), ino)
		if name != "" {
			line = fmt.Sprintf("%-72s %s", line, strings.ReplaceAll(name, "\n", `\012`))
		}
		b.WriteString(line)
		b.WriteByte('\n')
	}
}
