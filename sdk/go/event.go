package zentinel

import (
	"encoding/base64"
	"strings"
)

// Header contains the headers of a request or response, in the order of the event.
type Header []HeaderField

// HeaderField is a header with its value. Multiple values are joined with "; " for Cookie,
// otherwise with ", ".
type HeaderField struct {
	Name, Value string
	// Values contains each value of a header that has more than one.
	Values []string
}

// Get returns the value of a header, or "". It ignores the case of the name.
func (h Header) Get(name string) string {
	value, _ := h.Lookup(name)
	return value
}

// Lookup returns the value of a header and whether it exists. It ignores the case of the name.
func (h Header) Lookup(name string) (string, bool) {
	for i := range h {
		if len(h[i].Name) == len(name) && strings.EqualFold(h[i].Name, name) {
			return h[i].Value, true
		}
	}
	return "", false
}

// Request is a request whose headers have arrived.
type Request struct {
	Method string
	URI    string // path and query
	// ClientIP is the client's address, without a port.
	ClientIP string
	// CorrelationID identifies the request in logs. The client may have chosen it.
	CorrelationID string
	Header        Header

	// The following fields are empty if the agent does not know them.

	Protocol    string
	ServerName  string
	ClientPort  uint64
	RequestID   string
	RouteID     string
	UpstreamID  string
	Timestamp   string
	Traceparent string
	TLSVersion  string
}

// Chunk is a chunk of a body.
type Chunk struct {
	Data   []byte
	Index  uint64
	IsLast bool
	// TotalSize is the size of the whole body in bytes, or 0 if it is unknown.
	TotalSize uint64
	// BytesSoFar is the number of bytes of the body so far, including this chunk.
	BytesSoFar uint64
}

// RequestBody is a chunk of a request body, with the request as far as the agent knows it.
type RequestBody struct {
	Request
	Chunk
}

// Response is a response whose headers have arrived.
type Response struct {
	Status        int
	CorrelationID string
	Header        Header

	// The following fields describe the request. They are empty if the agent does not know them.

	Method   string
	URI      string
	ClientIP string
}

// ResponseBody is a chunk of a response body, with the response as far as the agent knows it.
type ResponseBody struct {
	Response
	Chunk
}

// WebsocketFrame is a WebSocket frame.
type WebsocketFrame struct {
	CorrelationID string
	Opcode        string // text, binary, ping, pong, close or continuation
	Data          []byte
	FromClient    bool
	Index         uint64
	Final         bool // whether this is the last frame of a message
	RouteID       string
	ClientIP      string
}

// Guardrail is text to inspect.
type Guardrail struct {
	CorrelationID string
	Inspection    string // prompt_injection or pii_detection
	Content       string
	Model         string
	Categories    []string
	RouteID       string
}

// Completion is the end of a request.
type Completion struct {
	CorrelationID    string
	Status           int
	DurationMs       uint64
	RequestBodySize  uint64
	ResponseBodySize uint64
	UpstreamAttempts uint64
	Error            string
}

// The field methods store the fields of an event by name and ignore unknown fields.

func (r *Request) field(name string, v value) {
	switch name {
	case "method":
		r.Method = v.text()
	case "uri":
		r.URI = v.text()
	case "client_ip":
		r.ClientIP = v.text()
	case "correlation_id":
		r.CorrelationID = v.text()
	case "headers", "header_values":
		r.Header.add(name, v)
	case "protocol":
		r.Protocol = v.text()
	case "server_name":
		r.ServerName = v.text()
	case "client_port":
		r.ClientPort = v.number()
	case "request_id":
		r.RequestID = v.text()
	case "route_id":
		r.RouteID = v.text()
	case "upstream_id":
		r.UpstreamID = v.text()
	case "timestamp":
		r.Timestamp = v.text()
	case "traceparent":
		r.Traceparent = v.text()
	case "tls_version":
		r.TLSVersion = v.text()
	}
}

func (r *Response) field(name string, v value) {
	switch name {
	case "status":
		r.Status = int(v.number())
	case "correlation_id":
		r.CorrelationID = v.text()
	case "headers", "header_values":
		r.Header.add(name, v)
	case "method":
		r.Method = v.text()
	case "uri":
		r.URI = v.text()
	case "client_ip":
		r.ClientIP = v.text()
	}
}

func (c *Chunk) field(name string, v value) {
	switch name {
	case "chunk_index":
		c.Index = v.number()
	case "is_last":
		c.IsLast = v.flag()
	case "total_size":
		c.TotalSize = v.number()
	case "bytes_received", "bytes_sent":
		c.BytesSoFar = v.number()
	}
}

func (b *RequestBody) field(name string, v value) {
	b.Request.field(name, v)
	b.Chunk.field(name, v)
}

func (b *ResponseBody) field(name string, v value) {
	b.Response.field(name, v)
	b.Chunk.field(name, v)
}

func (f *WebsocketFrame) field(name string, v value) {
	switch name {
	case "correlation_id":
		f.CorrelationID = v.text()
	case "opcode":
		f.Opcode = v.text()
	case "client_to_server":
		f.FromClient = v.flag()
	case "frame_index":
		f.Index = v.number()
	case "fin":
		f.Final = v.flag()
	case "route_id":
		f.RouteID = v.text()
	case "client_ip":
		f.ClientIP = v.text()
	}
}

func (g *Guardrail) field(name string, v value) {
	switch name {
	case "correlation_id":
		g.CorrelationID = v.text()
	case "inspection_type":
		g.Inspection = v.text()
	case "content":
		g.Content = v.text()
	case "model":
		g.Model = v.text()
	case "categories":
		g.Categories = v.texts()
	case "route_id":
		g.RouteID = v.text()
	}
}

func (c *Completion) field(name string, v value) {
	switch name {
	case "correlation_id":
		c.CorrelationID = v.text()
	case "status":
		c.Status = int(v.number())
	case "duration_ms":
		c.DurationMs = v.number()
	case "request_body_size":
		c.RequestBodySize = v.number()
	case "response_body_size":
		c.ResponseBodySize = v.number()
	case "upstream_attempts":
		c.UpstreamAttempts = v.number()
	case "error":
		c.Error = v.text()
	}
}

// add stores headers or, for headers that have more than one, their values. It accepts the two
// fields in either order.
func (h *Header) add(field string, v value) {
	v.members(func(name string, v value) {
		at := -1
		for i := range *h {
			if (*h)[i].Name == name {
				at = i
			}
		}
		if at < 0 {
			at = len(*h)
			*h = append(*h, HeaderField{Name: name})
		}
		if field == "headers" {
			(*h)[at].Value = v.text()
		} else {
			(*h)[at].Values = v.texts()
		}
	})
}

// payload decodes a body into bytes.
func payload(body, encoding string) []byte {
	if encoding != "base64" {
		return []byte(body)
	}
	bytes, err := base64.StdEncoding.DecodeString(body)
	if err != nil {
		panic("zentinel: the body is invalid base64")
	}
	return bytes
}
