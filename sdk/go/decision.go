package zentinel

import (
	"encoding/base64"
	"strconv"
	"strings"
)

// Action is the outcome of a decision.
type Action string

// The actions that the agent supports.
const (
	ActionAllow     Action = "allow"
	ActionBlock     Action = "block"
	ActionRedirect  Action = "redirect"
	ActionChallenge Action = "challenge"
)

// Pair is a name and a value.
type Pair struct {
	Name, Value string
	// More contains further values of a header that is set or appended, such as Set-Cookie.
	More []string
}

// Decision is the result of a hook. The zero value lets the event pass unchanged.
type Decision struct {
	Action Action
	// Status is the status of a block (200 to 599) or redirect (301, 302, 303, 307 or 308).
	Status int
	// Body is the body of a block, or the URL of a redirect.
	Body string

	ChallengeType   string
	ChallengeParams []Pair

	// Headers are removed first, then set, then appended. Appending keeps the existing values,
	// such as the cookies of the upstream.

	SetRequestHeaders     []Pair
	AppendRequestHeaders  []Pair
	RemoveRequestHeaders  []string
	SetResponseHeaders    []Pair
	AppendResponseHeaders []Pair
	RemoveResponseHeaders []string

	// For the audit log. Confidence ranges from 0 to 1; 0 is not sent.

	Tags        []string
	RuleIDs     []string
	ReasonCodes []string
	Confidence  float64

	RoutingMetadata []Pair
	// NeedsMore marks the decision as not final: the hook for the body decides.
	NeedsMore bool

	RequestBody  *BodyMutation
	ResponseBody *BodyMutation

	// DropFrame drops a WebSocket frame; CloseWebsocket closes the connection.
	DropFrame      bool
	CloseWebsocket *WebsocketClose

	// GuardrailResponse is the verdict of a guardrail inspection, as JSON.
	GuardrailResponse string
}

// BodyMutation replaces a chunk of a body with Data, or drops it.
// The agent treats dropping a non-empty chunk of a response as a module error, because the proxy
// would send the original.
type BodyMutation struct {
	Data []byte
	Drop bool
}

// WebsocketClose closes a connection with a code (RFC 6455, section 7.4) and a reason of at most
// 123 bytes.
type WebsocketClose struct {
	Code   int
	Reason string
}

// Allow lets the event pass unchanged.
func Allow() Decision {
	return Decision{}
}

// Block rejects the request or response with an HTTP status and a body.
func Block(status int, body string) Decision {
	return Decision{Action: ActionBlock, Status: status, Body: body}
}

// Redirect redirects the client to a URL, with status 302.
func Redirect(url string) Decision {
	return Decision{Action: ActionRedirect, Status: 302, Body: url}
}

// Challenge challenges the client, for example with a "captcha".
func Challenge(kind string, params ...Pair) Decision {
	return Decision{Action: ActionChallenge, ChallengeType: kind, ChallengeParams: params}
}

// json returns the answer for the agent, or nil if the decision is the zero value.
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

// last returns the last pair of each name, because a JSON object must not repeat a name.
func last(pairs []Pair, same func(a, b string) bool) []Pair {
	var kept []Pair
	for i, pair := range pairs {
		if indexOf(pairs[i+1:], pair.Name, same) < 0 {
			kept = append(kept, pair)
		}
	}
	return kept
}

// together returns one pair per header with all of its values, because a JSON object must not
// repeat a name.
func together(pairs []Pair) []Pair {
	var kept []Pair
	for _, pair := range pairs {
		at := indexOf(kept, pair.Name, strings.EqualFold)
		if at < 0 {
			kept = append(kept, pair)
			continue
		}
		// Copied, because More belongs to the caller.
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

// write encodes the data as base64, because a body need not be UTF-8.
func (m *BodyMutation) write(o *object, name string) {
	switch {
	case m == nil:
	case m.Drop:
		o.raw(name, `{"action":"drop"}`)
	default:
		o.raw(name, `{"action":"replace","data_base64":"`+base64.StdEncoding.EncodeToString(m.Data)+`"}`)
	}
}
