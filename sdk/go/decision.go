package zentinel

import (
	"encoding/base64"
	"strconv"
	"strings"
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
	// More holds further values of a header that is set or appended, such as Set-Cookie.
	More []string
}

// Decision is what a hook decides. The zero value lets the event go on unchanged.
type Decision struct {
	Action Action
	// Status is that of a block, 200 to 599, or of a redirect: 301, 302, 303, 307 or 308.
	Status int
	// Body is the body of a block, or the URL of a redirect.
	Body string

	ChallengeType   string
	ChallengeParams []Pair

	// Headers are removed first, then set, then appended: added beside what is there already, such as
	// a cookie beside those of the upstream.

	SetRequestHeaders     []Pair
	AppendRequestHeaders  []Pair
	RemoveRequestHeaders  []string
	SetResponseHeaders    []Pair
	AppendResponseHeaders []Pair
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
// The agent makes the drop of a chunk of a response that is not empty a module error, because the
// proxy would send the original.
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
	o.pairs("challenge_params", last(d.ChallengeParams, strings.EqualFold))
	o.pairs("add_request_headers", last(d.SetRequestHeaders, strings.EqualFold))
	o.pairs("append_request_headers", together(d.AppendRequestHeaders))
	o.texts("remove_request_headers", d.RemoveRequestHeaders)
	o.pairs("add_response_headers", last(d.SetResponseHeaders, strings.EqualFold))
	o.pairs("append_response_headers", together(d.AppendResponseHeaders))
	o.texts("remove_response_headers", d.RemoveResponseHeaders)
	o.texts("tags", d.Tags)
	o.texts("rule_ids", d.RuleIDs)
	o.texts("reason_codes", d.ReasonCodes)
	if d.Confidence > 0 {
		o.raw("confidence", strconv.FormatFloat(min(d.Confidence, 1), 'f', 6, 64))
	}
	o.pairs("routing_metadata", last(d.RoutingMetadata, func(a, b string) bool { return a == b }))
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

// An object of JSON holds a name once.

// last returns the pairs without those whose name is set again later.
func last(pairs []Pair, same func(a, b string) bool) []Pair {
	var kept []Pair
	for i, pair := range pairs {
		if indexOf(pairs[i+1:], pair.Name, same) < 0 {
			kept = append(kept, pair)
		}
	}
	return kept
}

// together returns one pair for each header, with the values of all that have its name.
func together(pairs []Pair) []Pair {
	var kept []Pair
	for _, pair := range pairs {
		at := indexOf(kept, pair.Name, strings.EqualFold)
		if at < 0 {
			kept = append(kept, pair)
			continue
		}
		// What More holds belongs to the caller.
		more := append([]string(nil), kept[at].More...)
		kept[at].More = append(append(more, pair.Value), pair.More...)
	}
	return kept
}

func indexOf(pairs []Pair, name string, same func(a, b string) bool) int {
	for i, pair := range pairs {
		if same(pair.Name, name) {
			return i
		}
	}
	return -1
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
