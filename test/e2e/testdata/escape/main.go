// Command escape tries to open each of its arguments, in several ways, and says
// which it could read. It exits with 1 if there was any.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

func main() {
	found := 0
	report := func(how, path string, err error) {
		if err == nil {
			fmt.Printf("%s %s worked\n", how, path)
			found = 1
		}
	}
	for _, path := range os.Args[1:] {
		_, err := os.ReadFile(path)
		report("read", path, err)
		_, err = os.Stat(path)
		report("stat", path, err)
		if os.Chdir(filepath.Dir(path)) != nil {
			os.Chdir("/")
		}
		os.Chdir("../../../../../../../../../../../..")
		if wd, err := os.Getwd(); err != nil || wd != "/" {
			report("left the root: "+wd, path, nil)
		}
		_, err = os.ReadFile(filepath.Base(path))
		report("read relative", path, err)
		report("exec", path, syscall.Exec(path, []string{path}, nil))
	}
	if err := syscall.Chroot("/dir"); err == nil {
		for _, path := range os.Args[1:] {
			_, err := os.ReadFile("../../../../.." + path)
			report("read after chroot", path, err)
		}
	}
	os.Exit(found)
}
