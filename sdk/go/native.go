//go:build !wasip1

package zentinel

// Outside of Wasm there is no agent: tests call policies with events of their own making.

func event(_, _ uint32) string {
	panic("zentinel: hooks can be called in Wasm alone")
}

func handOver(_ []byte) uint64 {
	panic("zentinel: hooks can be called in Wasm alone")
}
