// Package zentinel helps to write policies for the Zentinel proxy's Wasm agent.
//
// A module exports a function for each hook that it implements:
//
//	package main
//
//	import (
//		"strings"
//
//		zentinel "github.com/zentinelproxy/zentinel-agent-wasm/sdk/go"
//	)
//
//	func main() {} // never called, because the module is a library
//
//	//go:wasmexport on_request_headers
//	func onRequestHeaders(ptr, size uint32) uint64 {
//		return zentinel.OnRequest(ptr, size, check)
//	}
//
//	func check(request *zentinel.Request) zentinel.Decision {
//		if strings.Contains(request.URI, "/admin") {
//			return zentinel.Block(403, "Forbidden")
//		}
//		return zentinel.Allow()
//	}
//
// Build it as a library. Without -buildmode=c-shared it is a command, which the agent rejects:
//
//	GOOS=wasip1 GOARCH=wasm go build -buildmode=c-shared -trimpath -ldflags="-s -w" -o module.wasm .
//
// Panic messages and writes to the standard streams go to the agent's log. After a panic, the
// agent's failure mode decides.
package zentinel
