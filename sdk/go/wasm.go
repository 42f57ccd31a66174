//go:build wasip1

package zentinel

import "unsafe"

// Memory that the agent uses, by address. These references keep the garbage collector from freeing
// it.
var held = map[uint32][]byte{}

//go:wasmexport alloc
func alloc(size uint32) uint32 {
	return hold(make([]byte, max(size, 1)))
}

//go:wasmexport dealloc
func dealloc(ptr, _ uint32) {
	delete(held, ptr)
}

func hold(bytes []byte) uint32 {
	ptr := uint32(uintptr(unsafe.Pointer(unsafe.SliceData(bytes))))
	held[ptr] = bytes
	return ptr
}

// event copies the agent's input, because the policy may keep parts of it after the call.
func event(ptr, size uint32) string {
	return string(held[ptr][:size])
}

// handOver returns an answer to the agent: a pointer in the upper half, a length in the lower.
func handOver(json []byte) uint64 {
	if len(json) == 0 {
		return 0
	}
	return uint64(hold(json))<<32 | uint64(len(json))
}

//go:wasmimport zentinel log
func agentLog(level int32, message unsafe.Pointer, size uint32)

// Level is the level of a log line.
type Level int32

// The levels of the agent's log.
const (
	LevelTrace Level = iota
	LevelDebug
	LevelInfo
	LevelWarn
	LevelError
)

// Log writes a line to the agent's log.
func Log(level Level, message string) {
	agentLog(int32(level), unsafe.Pointer(unsafe.StringData(message)), uint32(len(message)))
}
