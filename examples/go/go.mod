module example.com/policies

go 1.24

require github.com/zentinelproxy/zentinel-agent-wasm/sdk/go v0.5.0

// In a project of your own, leave this line out.
replace github.com/zentinelproxy/zentinel-agent-wasm/sdk/go => ../../sdk/go
