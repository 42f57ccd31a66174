package zentinel

import (
	"encoding/base64"
	"strconv"
)

// Action is what becomes of a request or response.
type Action string

// The actions of the agent.
const (
	ActionAllow     Action = "allow"
	ActionBlock     Action = "block"
	ActionRedirect  Action = "redirect"
	ActionChallenge Action = "challenge"
)

// Pair is a name and a value.
type Pair struct {
	Name, Value string
	// More holds further values of a header that is set, such as Set-Cookie.
	More []string
}

// Decision is what a hook decides. The zero value lets the event go on unchanged.
type Decision struct {
	Action Action
	// Status is that of a block, 100 to 599, or of a redirect: 301, 302, 303, 307 or 308.
	Status int
	// Body is the body of a block, or the URL of a redirect.
	Body string

	ChallengeType   string
	ChallengeParams []Pair

	SetRequestHeaders     []Pair
	RemoveRequestHeaders  []string
	SetResponseHeaders    []Pair
	RemoveResponseHeaders []string

	// For the audit log. Confidence is from 0 to 1, and 0 is not sent.

	Tags        []string
	RuleIDs     []string
	ReasonCodes []string
	Confidence  float64

	RoutingMetadata []Pair
	// NeedsMore says that the decision is not final: the hook for the body decides.
	NeedsMore bool

	RequestBody  *BodyMutation
	ResponseBody *BodyMutation

	// DropFrame leaves a WebSocket frame out; CloseWebsocket ends the connection.
	DropFrame      bool
	CloseWebsocket *WebsocketClose

	// GuardrailResponse is the verdict of a guardrail inspection, as JSON.
	GuardrailResponse string
}

// BodyMutation is what becomes of one chunk of a body: it is replaced by Data, or dropped.
type BodyMutation struct {
	Data []byte
	Drop bool
}

// WebsocketClose is how a connection ends: with a code (RFC 6455, 7.4) and a reason of at most 123 bytes.
type WebsocketClose struct {
	Code   int
	Reason string
}

// Allow lets it go on.
func Allow() Decision {
	return Decision{}
}

// Block refuses it with an HTTP status and a body.
func Block(status int, body string) Decision {
	return Decision{Action: ActionBlock, Status: status, Body: body}
}

// Redirect sends the client to a URL, with status 302.
func Redirect(url string) Decision {
	return Decision{Action: ActionRedirect, Status: 302, Body: url}
}

// Challenge asks the client to prove something first, such as with a "captcha".
func Challenge(kind string, params ...Pair) Decision {
	return Decision{Action: ActionChallenge, ChallengeType: kind, ChallengeParams: params}
}

// json returns the answer for the agent; nothing when there is nothing to say.
func (d *Decision) json() []byte {
	var o object
	if d.Action != "" {
		o.text("decision", string(d.Action))
	}
	if d.Status != 0 {
		o.raw("status", strconv.Itoa(d.Status))
	}
	if d.Body != "" {
		o.text("body", d.Body)
	}
	if d.ChallengeType != "" {
		o.text("challenge_type", d.ChallengeType)
	}
	o.pairs("challenge_params", d.ChallengeParams)
	o.pairs("add_request_headers", d.SetRequestHeaders)
	o.texts("remove_request_headers", d.RemoveRequestHeaders)
	o.pairs("add_response_headers", d.SetResponseHeaders)
	o.texts("remove_response_headers", d.RemoveResponseHeaders)
	o.texts("tags", d.Tags)
	o.texts("rule_ids", d.RuleIDs)
	o.texts("reason_codes", d.ReasonCodes)
	if d.Confidence > 0 {
		o.raw("confidence", strconv.FormatFloat(min(d.Confidence, 1), 'f', 6, 64))
	}
	o.pairs("routing_metadata", d.RoutingMetadata)
	if d.NeedsMore {
		o.raw("needs_more", "true")
	}
	d.RequestBody.write(&o, "request_body_mutation")
	d.ResponseBody.write(&o, "response_body_mutation")
	switch {
	case d.CloseWebsocket != nil:
		var end object
		end.raw("code", strconv.Itoa(d.CloseWebsocket.Code))
		end.text("reason", d.CloseWebsocket.Reason)
		o.raw("websocket_decision", `{"close":`+string(end.end())+"}")
	case d.DropFrame:
		o.raw("websocket_decision", `"drop"`)
	}
	if d.GuardrailResponse != "" {
		o.raw("guardrail_response", d.GuardrailResponse)
	}
	return o.end()
}

// write sends the data as base64, since a body need not be text.
func (m *BodyMutation) write(o *object, name string) {
	switch {
	case m == nil:
	case m.Drop:
		o.raw(name, `{"action":"drop"}`)
	default:
		o.raw(name, `{"action":"replace","data_base64":"`+base64.StdEncoding.EncodeToString(m.Data)+`"}`)
	}
}
