package sentry

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
)

// ForwardedSignals are those that a program in a sandbox is to hear of when the
// sandbox's process gets them (Config.Signals).
var ForwardedSignals = []os.Signal{
	unix.SIGINT, unix.SIGQUIT, unix.SIGTSTP, unix.SIGWINCH, unix.SIGHUP, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2,
}

// ignoredSignals returns the signals of Config.Ignored.
func ignoredSignals(signals []os.Signal) (ignored []linux.Signal, err error) {
	for _, s := range signals {
		if !slices.Contains(ForwardedSignals, s) {
			return nil, fmt.Errorf("signal %v to be ignored: %w: it is none of the ForwardedSignals", s, unix.EINVAL)
		}
		ignored = append(ignored, linux.Signal(s.(unix.Signal)))
	}
	return ignored, nil
}

// forwarder passes the signals of this process on to the sandbox. Those that a
// terminal sends go to the process group in its foreground, others to the first
// program.
type forwarder struct {
	k *kernel.Kernel

	// closed is closed when nothing is forwarded any more. mu is held for that, and
	// while this process is stopped.
	closed chan struct{}
	mu     sync.Mutex
}

func newForwarder() *forwarder { return &forwarder{closed: make(chan struct{})} }

// forward passes signals on until close. The first program exists.
func (f *forwarder) forward(signals <-chan os.Signal) {
	for {
		select {
		case s, ok := <-signals:
			if !ok {
				return
			}
			deliver(f.k, s)
		case <-f.closed:
			return
		}
	}
}

func deliver(k *kernel.Kernel, s os.Signal) {
	if !slices.Contains(ForwardedSignals, s) {
		return
	}
	switch sig := linux.Signal(s.(unix.Signal)); sig {
	case linux.SIGINT, linux.SIGQUIT, linux.SIGTSTP, linux.SIGWINCH:
		k.SignalForeground(sig)
	default:
		k.SignalInit(sig)
	}
}

// close ends it.
func (f *forwarder) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.closed)
}

// stop stops this process when the first program has stopped, so that the shell
// outside sees it, and lets the sandbox go on when this process does. Where no
// shell could let it go on, the host ignores the signal, and so does the sandbox.
//
// The signal is SIGTTOU: once SIGTSTP is caught, the Go runtime does not give it
// back.
func (f *forwarder) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.closed:
		return
	default:
	}
	runtime.LockOSThread() // a signal to one's own thread comes at once
	defer runtime.UnlockOSThread()
	unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGTTOU)
	f.k.SignalForeground(linux.SIGCONT)
}
