// Command release writes release artifacts: archives, checksums and the bill of
// materials. Its output depends on its inputs alone: no time, no owner, no path
// of the machine. It depends on the standard library alone.
package main

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const modulePath = "github.com/ringfence/ringfence"

func main() {
	log.SetFlags(0)
	log.SetPrefix("release: ")
	args, err := expand(os.Args[1:])
	if err != nil {
		log.Fatal(err)
	}
	if len(args) == 0 {
		log.Fatal("usage: release tar|sums|sbom -out FILE ...")
	}
	flags := flag.NewFlagSet(args[0], flag.ExitOnError)
	out := flags.String("out", "", "`file` to write")
	prefix := flags.String("prefix", "", "tar: folder that everything lies in")
	var b bom
	flags.StringVar(&b.version, "version", "", "sbom: version of the project")
	flags.StringVar(&b.goVersion, "go", "", "sbom: version of the Go SDK")
	flags.StringVar(&b.goMod, "gomod", "", "sbom: the go.mod `file`")
	flags.StringVar(&b.goSum, "gosum", "", "sbom: the go.sum `file`")
	flags.StringVar(&b.imports, "imports", "", "sbom: `file` with the import paths of the linked packages, one a line")
	flags.Parse(args[1:])

	var write func(io.Writer) error
	switch args[0] {
	case "tar":
		write = func(w io.Writer) error { return archive(w, *prefix, flags.Args()) }
	case "sums":
		write = func(w io.Writer) error { return sums(w, flags.Args()) }
	case "sbom":
		write = func(w io.Writer) error { return b.write(w, flags.Args()) }
	default:
		log.Fatalf("unknown command %q", args[0])
	}
	f, err := os.Create(*out)
	if err != nil {
		log.Fatal(err)
	}
	if err := errors.Join(write(f), f.Close()); err != nil {
		log.Fatal(err)
	}
}

// expand replaces an argument @FILE by the lines of FILE.
func expand(args []string) ([]string, error) {
	if len(args) != 1 || !strings.HasPrefix(args[0], "@") {
		return args, nil
	}
	b, err := os.ReadFile(args[0][1:])
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n"), nil
}

// archive writes a compressed tar archive of files given as NAME=PATH, sorted by
// name. Of a file's mode only its being executable is kept.
func archive(w io.Writer, prefix string, files []string) error {
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	files = slices.Clone(files)
	slices.Sort(files)
	for _, f := range files {
		name, path, ok := strings.Cut(f, "=")
		if !ok {
			return fmt.Errorf("%q is not NAME=PATH", f)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		header := &tar.Header{Name: prefix + "/" + name, Mode: 0o644, Size: int64(len(content)), Format: tar.FormatPAX}
		if info.Mode()&0o111 != 0 {
			header.Mode = 0o755
		}
		if err := t.WriteHeader(header); err != nil {
			return err
		}
		if _, err := t.Write(content); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close())
}

func sha256Of(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// sums writes what sha256sum --check reads.
func sums(w io.Writer, files []string) error {
	var lines []string
	for _, f := range files {
		sum, err := sha256Of(f)
		if err != nil {
			return err
		}
		lines = append(lines, fmt.Sprintf("%s  %s\n", sum, filepath.Base(f)))
	}
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(a[64:], b[64:]) })
	_, err := io.WriteString(w, strings.Join(lines, ""))
	return err
}

// bom is what a bill of materials is made from.
type bom struct {
	version, goVersion, goMod, goSum, imports string
}

// The types of a CycloneDX 1.5 document, as far as one is written here.
type (
	document struct {
		BOMFormat   string   `json:"bomFormat"`
		SpecVersion string   `json:"specVersion"`
		Version     int      `json:"version"`
		Metadata    metadata `json:"metadata"`
		Components  []part   `json:"components"`
	}
	metadata struct {
		Component part `json:"component"`
	}
	part struct {
		Type     string    `json:"type"`
		Name     string    `json:"name"`
		Version  string    `json:"version,omitempty"`
		PURL     string    `json:"purl,omitempty"`
		Hashes   []hash    `json:"hashes,omitempty"`
		Licenses []license `json:"licenses,omitempty"`
	}
	hash struct {
		Alg     string `json:"alg"`
		Content string `json:"content"`
	}
	license struct {
		License struct {
			ID string `json:"id"`
		} `json:"license"`
	}
)

// write writes the document: the project, the Go standard library, each module
// that has a package among the imports, and the artifacts.
func (b *bom) write(w io.Writer, artifacts []string) error {
	project := part{Type: "application", Name: modulePath, Version: b.version, PURL: "pkg:golang/" + modulePath + "@v" + b.version, Licenses: make([]license, 1)}
	project.Licenses[0].License.ID = "Apache-2.0"
	d := document{BOMFormat: "CycloneDX", SpecVersion: "1.5", Version: 1, Metadata: metadata{project}}
	d.Components = append(d.Components, part{Type: "library", Name: "std", Version: "go" + b.goVersion, PURL: "pkg:golang/std@" + b.goVersion})
	modules, err := b.modules()
	if err != nil {
		return err
	}
	d.Components = append(d.Components, modules...)
	for _, a := range artifacts {
		sum, err := sha256Of(a)
		if err != nil {
			return err
		}
		d.Components = append(d.Components, part{Type: "file", Name: filepath.Base(a), Hashes: []hash{{"SHA-256", sum}}})
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(d)
}

// modules returns the required modules that are linked.
func (b *bom) modules() ([]part, error) {
	required, err := readLines(b.goMod)
	if err != nil {
		return nil, err
	}
	sumLines, err := readLines(b.goSum)
	if err != nil {
		return nil, err
	}
	imports, err := readLines(b.imports)
	if err != nil {
		return nil, err
	}
	versions := map[string]string{}
	inRequire := false
	for _, line := range required {
		line, _, _ = strings.Cut(line, "//")
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && f[0] == "require" && f[1] == "(":
			inRequire = true
		case len(f) == 1 && f[0] == ")":
			inRequire = false
		case len(f) == 3 && f[0] == "require":
			versions[f[1]] = f[2]
		case len(f) == 2 && inRequire:
			versions[f[0]] = f[1]
		}
	}
	linked := map[string]bool{}
	for _, path := range imports {
		if path == modulePath || strings.HasPrefix(path, modulePath+"/") {
			continue
		}
		module := path
		for versions[module] == "" {
			cut := strings.LastIndexByte(module, '/')
			if cut < 0 {
				return nil, fmt.Errorf("package %s belongs to no module that %s requires", path, b.goMod)
			}
			module = module[:cut]
		}
		linked[module] = true
	}
	var parts []part
	for module := range linked {
		p := part{Type: "library", Name: module, Version: versions[module], PURL: "pkg:golang/" + module + "@" + versions[module]}
		for _, line := range sumLines {
			// The h1 checksum: the base64 of a SHA-256 over the module's file list.
			if sum, ok := strings.CutPrefix(line, module+" "+versions[module]+" h1:"); ok {
				raw, err := base64.StdEncoding.DecodeString(sum)
				if err != nil {
					return nil, fmt.Errorf("%s: %q: %w", b.goSum, line, err)
				}
				p.Hashes = []hash{{"SHA-256", hex.EncodeToString(raw)}}
			}
		}
		if p.Hashes == nil {
			return nil, fmt.Errorf("%s has no checksum of %s %s: run go mod tidy", b.goSum, module, versions[module])
		}
		parts = append(parts, p)
	}
	slices.SortFunc(parts, func(a, b part) int { return strings.Compare(a.Name, b.Name) })
	return parts, nil
}

func readLines(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var lines []string
	s := bufio.NewScanner(f)
	for s.Scan() {
		lines = append(lines, s.Text())
	}
	return lines, s.Err()
}
