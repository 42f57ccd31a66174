// Challenges clients that look like bots.
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
	userAgent := strings.ToLower(request.Header.Get("User-Agent"))
	switch {
	case userAgent == "":
		decision := zentinel.Challenge("js_challenge")
		decision.Tags = []string{"no-user-agent"}
		return decision
	case strings.Contains(userAgent, "bot"), strings.Contains(userAgent, "curl"):
		decision := zentinel.Challenge("captcha", zentinel.Pair{Name: "site_key", Value: "your-captcha-site-key"})
		decision.Tags = []string{"suspicious-ua"}
		return decision
	}
	return zentinel.Allow()
}
