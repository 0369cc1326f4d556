package seccomp_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/internal/sample/rules"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// typical has arguments with which the hottest calls are made.
var typical = map[sysno.Call][6]uint64{
	sysno.Ioctl:      {8, 0xae80, 0}, // KVM_RUN on the first vCPU
	sysno.Ptrace:     {31},           // PTRACE_SYSEMU
	sysno.Wait4:      {4711, 0, unix.WALL},
	sysno.Futex:      {0, 0x80},
	sysno.Tgkill:     {4711, 4711, uint64(unix.SIGCHLD)},
	sysno.EpollPwait: {4},
	sysno.Mmap:       {0, 4096, unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED, 5},
}

// denied are calls that no rule allows: by number, and by argument.
var denied = map[string]bpf.Data{
	"denied-number":   {Nr: uint32(sysno.Reboot.On(sysno.AMD64))},
	"denied-argument": {Nr: uint32(sysno.Mprotect.On(sysno.AMD64)), Args: [6]uint64{0, 4096, unix.PROT_EXEC}},
}

// BenchmarkProgram reports how many instructions the kernel executes for the
// ten hottest calls and for denied ones, and how long programs are, beside the
// naive program of the same rules. The figures are those of amd64 everywhere.
func BenchmarkProgram(b *testing.B) {
	sources, err := rules.Sources(sysno.AMD64)
	if err != nil {
		b.Fatal(err)
	}
	for _, s := range sources {
		sets := s.Rules(rules.Values())
		built, err := seccomp.BuildProgram(sets, s.Options)
		if err != nil {
			b.Fatal(err)
		}
		naive, err := seccomp.BuildNaive(sets, s.Options)
		if err != nil {
			b.Fatal(err)
		}
		report := func(name, unit string, n, naive int) {
			b.Run(s.Key+"/"+name, func(b *testing.B) {
				for b.Loop() {
				}
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(float64(n), unit)
				b.ReportMetric(float64(naive), unit+"-naive")
				b.ReportMetric(float64(naive)/float64(n), "times-naive")
			})
		}
		compare := func(name string, d bpf.Data, want seccomp.Action) {
			d.Arch = sysno.AMD64.AuditArch()
			var executed [2]int
			for i, p := range []bpf.Program{built, naive} {
				r, err := p.Run(&d)
				if err != nil {
					b.Fatal(err)
				}
				if seccomp.Action(r.Action) != want {
					b.Fatalf("%s: %v, want %v", name, seccomp.Action(r.Action), want)
				}
				executed[i] = r.Executed
			}
			report(name, "executed", executed[0], executed[1])
		}

		report("length", "instructions", len(built), len(naive))
		for _, nr := range s.Options.HottestSyscalls {
			c, _ := sysno.AMD64.Find(nr)
			compare(c.String(), bpf.Data{Nr: uint32(nr), Args: typical[c]}, seccomp.Allow)
		}
		for name, d := range denied {
			compare(name, d, s.Options.DefaultAction)
		}
	}
}

// BenchmarkBuildProgram is the cost of compiling at start.
func BenchmarkBuildProgram(b *testing.B) {
	sources, err := rules.Sources(sysno.Native)
	if err != nil {
		b.Fatal(err)
	}
	sets := sources[0].Rules(rules.Values())
	for b.Loop() {
		if _, err := seccomp.BuildProgram(sets, sources[0].Options); err != nil {
			b.Fatal(err)
		}
	}
}
