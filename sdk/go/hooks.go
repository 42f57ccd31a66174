package zentinel

// The bodies of the exported functions: each takes the parameters from the agent and returns the
// result that the agent expects.

// OnRequest is the body of on_request_headers.
func OnRequest(ptr, size uint32, decide func(*Request) Decision) uint64 {
	return handOver(callRequest(event(ptr, size), decide))
}

// OnRequestBody is the body of on_request_body.
func OnRequestBody(ptr, size uint32, decide func(*RequestBody) Decision) uint64 {
	return handOver(callRequestBody(event(ptr, size), decide))
}

// OnResponse is the body of on_response_headers.
func OnResponse(ptr, size uint32, decide func(*Response) Decision) uint64 {
	return handOver(callResponse(event(ptr, size), decide))
}

// OnResponseBody is the body of on_response_body.
func OnResponseBody(ptr, size uint32, decide func(*ResponseBody) Decision) uint64 {
	return handOver(callResponseBody(event(ptr, size), decide))
}

// OnWebsocketFrame is the body of on_websocket_frame.
func OnWebsocketFrame(ptr, size uint32, decide func(*WebsocketFrame) Decision) uint64 {
	return handOver(callWebsocketFrame(event(ptr, size), decide))
}

// OnGuardrail is the body of on_guardrail_inspect.
func OnGuardrail(ptr, size uint32, decide func(*Guardrail) Decision) uint64 {
	var g Guardrail
	parse(event(ptr, size)).members(g.field)
	d := decide(&g)
	return handOver(d.json())
}

// OnCompletion is the body of on_request_complete.
func OnCompletion(ptr, size uint32, note func(*Completion)) uint64 {
	var c Completion
	parse(event(ptr, size)).members(c.field)
	note(&c)
	return 0
}

// OnConfigure is the body of on_configure. The function takes JSON; an error rejects the
// configuration.
func OnConfigure(ptr, size uint32, accept func(config []byte) error) uint64 {
	return handOver(callConfigure(event(ptr, size), accept))
}

func callRequest(json string, decide func(*Request) Decision) []byte {
	var r Request
	parse(json).members(r.field)
	d := decide(&r)
	return d.json()
}

func callRequestBody(json string, decide func(*RequestBody) Decision) []byte {
	var b RequestBody
	v := parse(json)
	v.members(b.field)
	b.Data = v.payload("body")
	d := decide(&b)
	return d.json()
}

func callResponse(json string, decide func(*Response) Decision) []byte {
	var r Response
	parse(json).members(r.field)
	d := decide(&r)
	return d.json()
}

func callResponseBody(json string, decide func(*ResponseBody) Decision) []byte {
	var b ResponseBody
	v := parse(json)
	v.members(b.field)
	b.Data = v.payload("body")
	d := decide(&b)
	return d.json()
}

func callWebsocketFrame(json string, decide func(*WebsocketFrame) Decision) []byte {
	var f WebsocketFrame
	v := parse(json)
	v.members(f.field)
	f.Data = v.payload("data")
	d := decide(&f)
	return d.json()
}

func callConfigure(json string, accept func(config []byte) error) []byte {
	if err := accept([]byte(json)); err != nil {
		var o object
		o.text("error", err.Error())
		return o.end()
	}
	return nil
}

// payload returns the bytes of a body chunk. A second field names their encoding.
func (v value) payload(name string) []byte {
	var body, encoding string
	v.members(func(field string, v value) {
		switch field {
		case name:
			body = v.text()
		case name + "_encoding":
			encoding = v.text()
		}
	})
	return payload(body, encoding)
}
