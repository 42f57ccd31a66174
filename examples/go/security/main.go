// Blocks all requests to /admin.
package main

import (
	"strings"

	zentinel "github.com/zentinelproxy/zentinel-agent-wasm/sdk/go"
)

func main() {} // never called, because the module is a library

//go:wasmexport on_request_headers
func onRequestHeaders(ptr, size uint32) uint64 {
	return zentinel.OnRequest(ptr, size, check)
}

func check(request *zentinel.Request) zentinel.Decision {
	if strings.Contains(request.URI, "/admin") {
		return zentinel.Block(403, "Forbidden")
	}
	return zentinel.Allow()
}
