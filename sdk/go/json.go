package zentinel

import (
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// The reader does not copy the text of an event, and allocates only for strings that contain an
// escape. encoding/json would work too, but each call would take several times as long, and each
// module would be a megabyte larger.

// maxDepth exceeds the depth of any event.
const maxDepth = 1024

// value is a JSON value of a validated event.
type value string

// parse validates text as a single JSON object.
func parse(text string) value {
	s := scanner{text: text}
	v := s.value()
	s.space()
	if s.at != len(text) || v[0] != '{' {
		panic(invalid)
	}
	return v
}

const invalid = "zentinel: the event is not valid JSON"

// text returns the text of a string, or "" for any other value.
func (v value) text() string {
	if v == "" || v[0] != '"' {
		return ""
	}
	return unescape(string(v[1 : len(v)-1]))
}

func (v value) flag() bool {
	return v == "true"
}

// number returns a non-negative integer that fits, or 0 for any other value.
func (v value) number() uint64 {
	n, err := strconv.ParseUint(string(v), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func (v value) texts() []string {
	var texts []string
	if v == "" || v[0] != '[' {
		return nil
	}
	s := scanner{text: string(v), at: 1}
	for s.more(']') {
		texts = append(texts, s.value().text())
	}
	return texts
}

// members calls do for each member of an object, in document order.
func (v value) members(do func(name string, v value)) {
	if v == "" || v[0] != '{' {
		return
	}
	s := scanner{text: string(v), at: 1}
	for s.more('}') {
		name := s.name()
		do(name.text(), s.value())
	}
}

type scanner struct {
	text string
	at   int
}

func (s *scanner) peek() byte {
	if s.at < len(s.text) {
		return s.text[s.at]
	}
	return 0
}

func (s *scanner) take(b byte) bool {
	if s.peek() != b {
		return false
	}
	s.at++
	return true
}

func (s *scanner) space() {
	for {
		switch s.peek() {
		case ' ', '\n', '\r', '\t':
			s.at++
		default:
			return
		}
	}
}

// more skips a comma in a validated container and reports whether another item follows.
func (s *scanner) more(end byte) bool {
	s.space()
	s.take(',')
	s.space()
	return s.peek() != end
}

func (s *scanner) name() value {
	s.space()
	start := s.at
	s.string()
	name := s.text[start:s.at]
	s.space()
	if !s.take(':') {
		panic(invalid)
	}
	return value(name)
}

// value skips the next value, including all nested values. It does not recurse.
func (s *scanner) value() value {
	s.space()
	start := s.at
	var open []byte // the closing brackets of the open containers
	for {
		s.space()
		switch b := s.peek(); b {
		case '"':
			s.string()
		case '{', '[':
			end := b + 2 // in ASCII
			s.at++
			s.space()
			if s.take(end) {
				break
			}
			if len(open) == maxDepth {
				panic("zentinel: the event is nested deeper than 1024 levels")
			}
			open = append(open, end)
			if end == '}' {
				s.name()
			}
			continue
		default:
			s.scalar()
		}
		// After a value, each enclosing container continues or ends.
		for len(open) > 0 {
			end := open[len(open)-1]
			s.space()
			if s.take(',') {
				if end == '}' {
					s.name()
				}
				break
			}
			if !s.take(end) {
				panic(invalid)
			}
			open = open[:len(open)-1]
		}
		if len(open) == 0 {
			return value(s.text[start:s.at])
		}
	}
}

func (s *scanner) string() {
	if !s.take('"') {
		panic(invalid)
	}
	for s.at < len(s.text) {
		b := s.text[s.at]
		s.at++
		switch {
		case b == '"':
			return
		case b < 0x20:
			panic(invalid)
		case b == '\\':
			s.escape()
		}
	}
	panic(invalid)
}

func (s *scanner) escape() {
	switch s.peek() {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		s.at++
	case 'u':
		s.at++
		if hex4(s.text[s.at:]) < 0 {
			panic(invalid)
		}
		s.at += 4
	default:
		panic(invalid)
	}
}

func (s *scanner) scalar() {
	for _, word := range [...]string{"true", "false", "null"} {
		if strings.HasPrefix(s.text[s.at:], word) {
			s.at += len(word)
			return
		}
	}
	s.take('-')
	if !s.take('0') {
		s.digits()
	}
	if s.take('.') {
		s.digits()
	}
	if s.take('e') || s.take('E') {
		if !s.take('+') {
			s.take('-')
		}
		s.digits()
	}
}

func (s *scanner) digits() {
	start := s.at
	for b := s.peek(); '0' <= b && b <= '9'; b = s.peek() {
		s.at++
	}
	if s.at == start {
		panic(invalid)
	}
}

// hex4 reads four hexadecimal digits, or returns -1 if text does not start with four.
func hex4(text string) rune {
	if len(text) < 4 {
		return -1
	}
	var unit rune
	for i := 0; i < 4; i++ {
		switch b := text[i]; {
		case '0' <= b && b <= '9':
			unit = unit<<4 | rune(b-'0')
		case 'a' <= b|0x20 && b|0x20 <= 'f':
			unit = unit<<4 | rune(b|0x20-'a'+10)
		default:
			return -1
		}
	}
	return unit
}

// unescape decodes the content of a string. An unpaired surrogate becomes U+FFFD.
func unescape(raw string) string {
	at := strings.IndexByte(raw, '\\')
	if at < 0 {
		return raw
	}
	out := make([]byte, 0, len(raw))
	for ; at >= 0 && at+1 < len(raw); at = strings.IndexByte(raw, '\\') {
		out = append(out, raw[:at]...)
		escape := raw[at+1]
		raw = raw[at+2:]
		switch escape {
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'u':
			unit := hex4(raw)
			raw = raw[4:]
			if utf16.IsSurrogate(unit) {
				pair := rune(utf8.RuneError)
				if strings.HasPrefix(raw, "\\u") {
					pair = utf16.DecodeRune(unit, hex4(raw[2:]))
				}
				if pair != utf8.RuneError {
					raw = raw[6:]
				}
				unit = pair
			}
			out = utf8.AppendRune(out, unit)
		default:
			out = append(out, escape)
		}
	}
	return string(append(out, raw...))
}

// object writes a JSON object member by member.
type object struct {
	out []byte
}

func (o *object) key(name string) {
	if len(o.out) == 0 {
		o.out = append(o.out, '{')
	} else {
		o.out = append(o.out, ',')
	}
	o.out = appendString(o.out, name)
	o.out = append(o.out, ':')
}

func (o *object) text(name, text string) {
	o.key(name)
	o.out = appendString(o.out, text)
}

func (o *object) raw(name, json string) {
	o.key(name)
	o.out = append(o.out, json...)
}

func (o *object) texts(name string, texts []string) {
	if len(texts) == 0 {
		return
	}
	o.key(name)
	o.out = appendStrings(o.out, texts)
}

func (o *object) pairs(name string, pairs []Pair) {
	if len(pairs) == 0 {
		return
	}
	o.key(name)
	var inner object
	for _, pair := range pairs {
		if len(pair.More) == 0 {
			inner.text(pair.Name, pair.Value)
			continue
		}
		inner.key(pair.Name)
		inner.out = appendStrings(inner.out, append([]string{pair.Value}, pair.More...))
	}
	o.out = append(o.out, inner.end()...)
}

// end returns the JSON, or nil if there are no members.
func (o *object) end() []byte {
	if len(o.out) == 0 {
		return nil
	}
	return append(o.out, '}')
}

func appendStrings(out []byte, texts []string) []byte {
	out = append(out, '[')
	for i, text := range texts {
		if i > 0 {
			out = append(out, ',')
		}
		out = appendString(out, text)
	}
	return append(out, ']')
}

// appendString appends a JSON string. Invalid UTF-8 becomes U+FFFD.
func appendString(out []byte, text string) []byte {
	const hex = "0123456789abcdef"
	if !utf8.ValidString(text) {
		text = strings.ToValidUTF8(text, "\ufffd")
	}
	out = append(out, '"')
	start := 0
	for i := 0; i < len(text); i++ {
		b := text[i]
		if b >= 0x20 && b != '"' && b != '\\' {
			continue
		}
		out = append(out, text[start:i]...)
		start = i + 1
		if b == '"' || b == '\\' {
			out = append(out, '\\', b)
		} else {
			out = append(out, '\\', 'u', '0', '0', hex[b>>4], hex[b&15])
		}
	}
	out = append(out, text[start:]...)
	return append(out, '"')
}
