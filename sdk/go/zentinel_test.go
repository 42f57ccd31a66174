package zentinel

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestReadsRequests(t *testing.T) {
	event := ` {"x":[{"y":[]}],"header_values":{"Cookie":["a=1","b=2"]},"headers":{"\u0055ser-agent":"a\"b","Cookie":"a=1; b=2"},
		"ur\u0069":"\/old","uri":"\/\u0061dmin\ud83d\ude00","client_port":443,"tls_version":null,"n":1e400} `
	callRequest(event, func(r *Request) Decision {
		if r.URI != "/admin😀" || r.ClientPort != 443 || r.TLSVersion != "" || r.Method != "" {
			t.Errorf("read %+v", r)
		}
		if got := r.Header.Get("USER-AGENT"); got != `a"b` {
			t.Errorf("User-Agent is %q", got)
		}
		if got := r.Header[0].Values; !reflect.DeepEqual(got, []string{"a=1", "b=2"}) {
			t.Errorf("cookies are %q", got)
		}
		if _, ok := r.Header.Lookup("Accept"); ok {
			t.Error("found an Accept header")
		}
		return Allow()
	})
}

func TestDecodesBodies(t *testing.T) {
	callRequestBody(`{"method":"POST","body":"/wA=","body_encoding":"base64","is_last":true,"chunk_index":2}`, func(b *RequestBody) Decision {
		if string(b.Data) != "\xff\x00" || b.Method != "POST" || !b.IsLast || b.Index != 2 {
			t.Errorf("read %+v", b)
		}
		return Allow()
	})
	callResponseBody(`{"status":404,"body":"a\nb"}`, func(b *ResponseBody) Decision {
		if string(b.Data) != "a\nb" || b.Status != 404 || b.IsLast {
			t.Errorf("read %+v", b)
		}
		return Allow()
	})
	callWebsocketFrame(`{"opcode":"text","data":"hi","client_to_server":true}`, func(f *WebsocketFrame) Decision {
		if string(f.Data) != "hi" || !f.FromClient {
			t.Errorf("read %+v", f)
		}
		return Allow()
	})
}

func TestStringsAgreeWithEncodingJSON(t *testing.T) {
	for _, raw := range []string{
		`"\" \\ \/ \b \f \n \r \t \u0041"`, `"é\uD83D\ude00\u20ac"`, `"\\u0041"`, `"\ud83d"`, `"\ude00x"`, `"\ud83dx"`,
		`"\ud83d\u0041"`, `"\ud83d\ud83d\ude00"`, `"\ud83d\n"`, `"\u0000"`, `""`,
	} {
		var want string
		if err := json.Unmarshal([]byte(raw), &want); err != nil {
			t.Fatal(err)
		}
		if got := value(raw).text(); got != want {
			t.Errorf("%s: got %q, want %q", raw, got, want)
		}
	}
}

func FuzzParseAgreesWithEncodingJSON(f *testing.F) {
	for _, text := range []string{
		`{}`, `{"a":[1,{"b":null}]}`, `{"a":1,}`, `{"a" 1}`, `{"a":"\u12"}`, `{"a":01}`, `{"a":-}`, `{"a":[}]}`, "{\"a\":\"\n\"}", `{} x`, `[`, ``,
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		want := json.Valid([]byte(text)) && strings.HasPrefix(strings.TrimLeft(text, " \t\r\n"), "{")
		if strings.Count(text, "{")+strings.Count(text, "[") > maxDepth {
			t.Skip()
		}
		defer func() {
			if got := recover() == nil; got != want {
				t.Errorf("%q: accepted %v, valid %v", text, got, want)
			}
		}()
		parse(text).members(func(_ string, v value) { v.text(); v.texts(); v.number() })
	})
}

func TestRejectsDeepNesting(t *testing.T) {
	parse(`{"a":` + strings.Repeat("[", 1000) + strings.Repeat("]", 1000) + "}")
	defer func() {
		if recover() == nil {
			t.Error("accepted a million levels")
		}
	}()
	parse(`{"a":` + strings.Repeat("[", 1000000))
}

func TestWritesDecisions(t *testing.T) {
	for want, decision := range map[string]Decision{
		``: Allow(),
		`{"decision":"block","status":403,"body":"né\"\\\u000a"}`:                                                                           Block(403, "né\"\\\n"),
		`{"decision":"redirect","status":302,"body":"/login"}`:                                                                              Redirect("/login"),
		`{"decision":"challenge","challenge_type":"captcha","challenge_params":{"site_key":"k"}}`:                                           Challenge("captcha", Pair{Name: "site_key", Value: "k"}),
		`{"add_response_headers":{"Set-Cookie":["a=1","b=2"]},"remove_response_headers":["Server"],"tags":["a","b"],"confidence":0.950000}`: {SetResponseHeaders: []Pair{{Name: "Set-Cookie", Value: "a=1", More: []string{"b=2"}}}, RemoveResponseHeaders: []string{"Server"}, Tags: []string{"a", "b"}, Confidence: 0.95},
		`{"append_request_headers":{"Cookie":["a=1","b=2","c=3"],"X-A":"1"},"append_response_headers":{"Set-Cookie":"a=1"}}`: {
			AppendRequestHeaders:  []Pair{{Name: "Cookie", Value: "a=1"}, {Name: "X-A", Value: "1"}, {Name: "cookie", Value: "b=2", More: []string{"c=3"}}},
			AppendResponseHeaders: []Pair{{Name: "Set-Cookie", Value: "a=1"}},
		},
		`{"decision":"challenge","challenge_type":"x","challenge_params":{"A":"2"},"add_request_headers":{"X-A":"2"},"routing_metadata":{"a":"1","A":"2"}}`: {
			Action: ActionChallenge, ChallengeType: "x",
			ChallengeParams:   []Pair{{Name: "a", Value: "1"}, {Name: "A", Value: "2"}},
			SetRequestHeaders: []Pair{{Name: "x-a", Value: "1"}, {Name: "X-A", Value: "2"}},
			RoutingMetadata:   []Pair{{Name: "a", Value: "0"}, {Name: "a", Value: "1"}, {Name: "A", Value: "2"}},
		},
		`{"needs_more":true,"request_body_mutation":{"action":"replace","data_base64":"/wA="}}`: {NeedsMore: true, RequestBody: &BodyMutation{Data: []byte{0xff, 0}}},
		`{"response_body_mutation":{"action":"drop"},"websocket_decision":"drop"}`:              {ResponseBody: &BodyMutation{Drop: true}, DropFrame: true},
		`{"websocket_decision":{"close":{"code":1008,"reason":"no"}}}`:                          {CloseWebsocket: &WebsocketClose{Code: 1008, Reason: "no"}},
	} {
		if got := string(decision.json()); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if want != "" && !json.Valid([]byte(want)) {
			t.Errorf("%s is not JSON", want)
		}
	}
}

func TestRejectsConfigurations(t *testing.T) {
	got := callConfigure("{}", func([]byte) error { return errors.New(`no "key"`) })
	if string(got) != `{"error":"no \"key\""}` {
		t.Errorf("wrote %s", got)
	}
	if got := callConfigure("{}", func([]byte) error { return nil }); got != nil {
		t.Errorf("wrote %s", got)
	}
}
