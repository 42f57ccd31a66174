// Uses most of what a policy can read and answer. Its decisions serve no purpose.
package main

import (
	"bytes"
	"errors"

	zentinel "github.com/zentinelproxy/zentinel-agent-wasm/sdk/go"
)

func main() {} // never called, because the module is a library

//go:wasmexport on_configure
func onConfigure(ptr, size uint32) uint64 {
	return zentinel.OnConfigure(ptr, size, func(config []byte) error {
		if !bytes.Contains(config, []byte(`"greeting"`)) {
			return errors.New("missing `greeting`")
		}
		return nil
	})
}

//go:wasmexport on_request_headers
func onRequestHeaders(ptr, size uint32) uint64 {
	return zentinel.OnRequest(ptr, size, func(request *zentinel.Request) zentinel.Decision {
		zentinel.Log(zentinel.LevelInfo, "a request")
		return zentinel.Decision{
			SetRequestHeaders:     []zentinel.Pair{{Name: "X-Seen", Value: request.Method + " " + request.URI}},
			AppendRequestHeaders:  []zentinel.Pair{{Name: "Cookie", Value: "tour=1"}},
			RemoveRequestHeaders:  []string{"X-Debug"},
			SetResponseHeaders:    []zentinel.Pair{{Name: "X-Frame-Options", Value: "DENY"}},
			RemoveResponseHeaders: []string{"Server"},
			Tags:                  []string{"tour"},
			RuleIDs:               []string{"T-1"},
			ReasonCodes:           []string{"SEEN"},
			Confidence:            0.5,
			RoutingMetadata:       []zentinel.Pair{{Name: "upstream", Value: "blue"}},
			NeedsMore:             true,
		}
	})
}

//go:wasmexport on_request_body
func onRequestBody(ptr, size uint32) uint64 {
	return zentinel.OnRequestBody(ptr, size, func(body *zentinel.RequestBody) zentinel.Decision {
		return zentinel.Decision{RequestBody: &zentinel.BodyMutation{Data: append(body.Data, 0xff)}}
	})
}

//go:wasmexport on_response_headers
func onResponseHeaders(ptr, size uint32) uint64 {
	return zentinel.OnResponse(ptr, size, func(response *zentinel.Response) zentinel.Decision {
		if response.Status >= 500 {
			decision := zentinel.Redirect("/sorry")
			decision.Status = 303
			return decision
		}
		var cookies []string
		for _, field := range response.Header {
			if field.Name == "Set-Cookie" {
				cookies = field.Values
			}
		}
		cookies = append(cookies, "tour=1")
		return zentinel.Decision{
			SetResponseHeaders:    []zentinel.Pair{{Name: "Set-Cookie", Value: cookies[0], More: cookies[1:]}},
			AppendResponseHeaders: []zentinel.Pair{{Name: "Vary", Value: "Cookie"}, {Name: "Vary", Value: "Accept"}},
		}
	})
}

//go:wasmexport on_response_body
func onResponseBody(ptr, size uint32) uint64 {
	return zentinel.OnResponseBody(ptr, size, func(body *zentinel.ResponseBody) zentinel.Decision {
		if len(body.Data) == 0 {
			return zentinel.Decision{ResponseBody: &zentinel.BodyMutation{Drop: true}}
		}
		return zentinel.Decision{ResponseBody: &zentinel.BodyMutation{Data: append(body.Data, '!')}}
	})
}

//go:wasmexport on_websocket_frame
func onWebsocketFrame(ptr, size uint32) uint64 {
	return zentinel.OnWebsocketFrame(ptr, size, func(frame *zentinel.WebsocketFrame) zentinel.Decision {
		switch {
		case frame.Opcode == "ping":
			return zentinel.Decision{DropFrame: true}
		case frame.FromClient && string(frame.Data) == "bye":
			return zentinel.Decision{CloseWebsocket: &zentinel.WebsocketClose{Code: 1008, Reason: "bye"}}
		}
		return zentinel.Allow()
	})
}
