module github.com/zentinelproxy/zentinel-agent-wasm/sdk/go

go 1.24
