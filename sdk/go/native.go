//go:build !wasip1

package zentinel

// On targets other than Wasm there is no agent. Tests call policies with events that they create.

func event(_, _ uint32) string {
	panic("zentinel: hooks can only be called in Wasm")
}

func handOver(_ []byte) uint64 {
	panic("zentinel: hooks can only be called in Wasm")
}
