// Command goprog runs 100 goroutines with timers, and signals itself.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	sigs := make(chan os.Signal, 1)
	signal.Notify(sigs, syscall.SIGUSR1)

	var sum atomic.Int64
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			for range 3 {
				<-time.After(time.Duration(1+i%7) * time.Millisecond)
				sum.Add(int64(i))
			}
		})
	}
	wg.Wait()

	if err := syscall.Kill(os.Getpid(), syscall.SIGUSR1); err != nil {
		fmt.Println("kill:", err)
		os.Exit(1)
	}
	select {
	case s := <-sigs:
		fmt.Println("sum", sum.Load(), "signal", s)
	case <-time.After(time.Minute):
		fmt.Println("no signal")
		os.Exit(1)
	}

	ticker := time.NewTicker(2 * time.Millisecond)
	for range 5 {
		<-ticker.C
	}
	fmt.Println("ticks done")
	os.Exit(7)
}
