module example.com/policies

go 1.24

require github.com/zentinelproxy/zentinel-agent-wasm/sdk/go v0.5.0

// Remove this line in your own project.
replace github.com/zentinelproxy/zentinel-agent-wasm/sdk/go => ../../sdk/go
