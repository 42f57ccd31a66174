/** Decisions of hooks. */

import { quote } from "./json";
import { Writer } from "./writer";

const COMMA: u8 = 0x2c;
const COLON: u8 = 0x3a;
const OPEN_ARRAY: u8 = 0x5b;
const CLOSE_ARRAY: u8 = 0x5d;
const OPEN_OBJECT: u8 = 0x7b;
const CLOSE_OBJECT: u8 = 0x7d;

/** The kind of an item. */
enum Kind {
  Field,
  Param,
  SetRequest,
  AppendRequest,
  RemoveRequest,
  SetResponse,
  AppendResponse,
  RemoveResponse,
  Tag,
  RuleId,
  ReasonCode,
  Route,
}

/** A part of a decision. All are kept in one list, because most decisions have few. */
class Item {
  next: Item | null = null;

  constructor(
    readonly kind: Kind,
    readonly name: string,
    readonly value: string,
  ) {}

  /** Whether the item has this kind and name. Names of headers and params ignore case. */
  is(kind: Kind, name: string): bool {
    if (this.kind != kind || this.name.length != name.length) return false;
    const ignoringCase = kind != Kind.Field && kind != Kind.Route;
    for (let at = 0; at < name.length; at++) {
      const one = this.name.charCodeAt(at);
      const other = name.charCodeAt(at);
      if (one != other && !(ignoringCase && lower(one) == lower(other))) return false;
    }
    return true;
  }
}

/**
 * A change to a chunk of a body: replaces it with text or bytes, or drops it. It is encoded only
 * when the decision is written.
 */
class BodyChange {
  constructor(
    private readonly text: string | null,
    private readonly bytes: Uint8Array | null,
  ) {}

  write(out: Writer): void {
    const text = this.text;
    const bytes = this.bytes;
    if (text != null) {
      out.raw('{"action":"replace","data":');
      out.quoted(text);
      out.raw("}");
    } else if (bytes != null) {
      out.raw('{"action":"replace","data_base64":"');
      out.base64(bytes);
      out.raw('"}');
    } else {
      out.raw('{"action":"drop"}');
    }
  }
}

/**
 * The decision on a request, response or WebSocket frame, with changes and data for the audit log.
 * Each method returns the decision that it was called on.
 */
export class Decision {
  private first: Item | null = null;
  private last: Item | null = null;
  private requestBody: BodyChange | null = null;
  private responseBody: BodyChange | null = null;

  /** Allows the request or response. */
  static allow(): Decision {
    return new Decision();
  }

  /** Rejects the request or response with an HTTP status, 200 to 599, and a body. */
  static block(status: i32, body: string = ""): Decision {
    const decision = new Decision().field("decision", '"block"').field("status", status.toString());
    return body.length > 0 ? decision.field("body", quote(body)) : decision;
  }

  /** Redirects the client with status 301, 302, 303, 307 or 308. */
  static redirect(url: string, status: i32 = 302): Decision {
    return new Decision().field("decision", '"redirect"').field("status", status.toString()).field("body", quote(url));
  }

  /** Challenges the client, for example with a `captcha`. */
  static challenge(type: string): Decision {
    return new Decision().field("decision", '"challenge"').field("challenge_type", quote(type));
  }

  /** Sets a parameter of a challenge. */
  param(name: string, value: string): this {
    return this.remove(Kind.Param, name).add(Kind.Param, name, value);
  }

  /** Sets a header of the request to the upstream. */
  setRequestHeader(name: string, value: string): this {
    return this.remove(Kind.SetRequest, name).add(Kind.SetRequest, name, value);
  }

  /** Appends a value to a header of the request to the upstream and keeps the existing values. */
  appendRequestHeader(name: string, value: string): this {
    return this.add(Kind.AppendRequest, name, value);
  }

  /** Removes a header from the request to the upstream. */
  removeRequestHeader(name: string): this {
    return this.add(Kind.RemoveRequest, "", name);
  }

  /** Sets a header of the response to the client. */
  setResponseHeader(name: string, value: string): this {
    return this.remove(Kind.SetResponse, name).add(Kind.SetResponse, name, value);
  }

  /** Sets a header of the response, such as Set-Cookie, to several values. */
  setResponseHeaderValues(name: string, values: string[]): this {
    this.remove(Kind.SetResponse, name);
    for (let at = 0; at < values.length; at++) this.add(Kind.SetResponse, name, values[at]);
    return this;
  }

  /**
   * Appends a value to a header of the response to the client and keeps the existing values, such
   * as the cookies of the upstream.
   */
  appendResponseHeader(name: string, value: string): this {
    return this.add(Kind.AppendResponse, name, value);
  }

  /** Removes a header from the response to the client. */
  removeResponseHeader(name: string): this {
    return this.add(Kind.RemoveResponse, "", name);
  }

  /** Adds a free-form tag to the audit log. */
  tag(tag: string): this {
    return this.add(Kind.Tag, "", tag);
  }

  /** Adds the id of a rule that matched to the audit log. */
  ruleId(ruleId: string): this {
    return this.add(Kind.RuleId, "", ruleId);
  }

  /** Adds a structured reason to the audit log. */
  reasonCode(reasonCode: string): this {
    return this.add(Kind.ReasonCode, "", reasonCode);
  }

  /**
   * Sets the confidence of the decision, 0 to 1. Other values are clamped to this range; NaN
   * becomes 0.
   */
  confidence(score: f64): this {
    const clamped = isNaN(score) ? 0 : Math.min(Math.max(score, 0), 1);
    return this.field("confidence", clamped.toString());
  }

  /** Sets routing metadata, a hint for the choice of an upstream. */
  routing(name: string, value: string): this {
    return this.remove(Kind.Route, name).add(Kind.Route, name, value);
  }

  /** Marks the decision as not final: the hook for the body decides. */
  needsMore(): this {
    return this.field("needs_more", "true");
  }

  /** Replaces this chunk of the request body with text. */
  replaceRequestBody(text: string): this {
    this.requestBody = new BodyChange(text, null);
    return this;
  }

  /** Replaces this chunk of the request body with bytes, which need not be UTF-8. */
  replaceRequestBodyBytes(bytes: Uint8Array): this {
    this.requestBody = new BodyChange(null, bytes);
    return this;
  }

  /** Drops this chunk of the request body. */
  dropRequestBody(): this {
    this.requestBody = new BodyChange(null, null);
    return this;
  }

  /** Replaces this chunk of the response body with text. */
  replaceResponseBody(text: string): this {
    this.responseBody = new BodyChange(text, null);
    return this;
  }

  /** Replaces this chunk of the response body with bytes, which need not be UTF-8. */
  replaceResponseBodyBytes(bytes: Uint8Array): this {
    this.responseBody = new BodyChange(null, bytes);
    return this;
  }

  /**
   * Drops this chunk of the response body. The agent treats this as a module error unless the
   * chunk is empty, because the proxy would send the original.
   */
  dropResponseBody(): this {
    this.responseBody = new BodyChange(null, null);
    return this;
  }

  /** Drops this WebSocket frame. */
  dropFrame(): this {
    return this.field("websocket_decision", '"drop"');
  }

  /**
   * Closes the WebSocket connection with a code (RFC 6455, section 7.4) and a reason of at most
   * 123 bytes.
   */
  closeWebsocket(code: i32, reason: string): this {
    return this.field(
      "websocket_decision",
      '{"close":{"code":' + code.toString() + ',"reason":' + quote(reason) + "}}",
    );
  }

  /** Sets any other field, such as `guardrail_response`, to JSON. */
  field(name: string, json: string): this {
    return this.remove(Kind.Field, name).add(Kind.Field, name, json);
  }

  /** Returns the answer as JSON, or an empty string if the decision changes nothing. */
  toJson(): string {
    const out = new Writer();
    this.write(out);
    return out.takeString();
  }

  /** Writes the JSON that `toJson` returns. */
  write(out: Writer): void {
    for (let item = this.first; item != null; item = item!.next) {
      if (item.kind != Kind.Field) continue;
      writeName(out, item.name);
      out.raw(item.value);
    }
    this.writePairs(out, Kind.Param, "challenge_params");
    this.writePairs(out, Kind.SetRequest, "add_request_headers");
    this.writePairs(out, Kind.AppendRequest, "append_request_headers");
    this.writeTexts(out, Kind.RemoveRequest, "remove_request_headers");
    this.writePairs(out, Kind.SetResponse, "add_response_headers");
    this.writePairs(out, Kind.AppendResponse, "append_response_headers");
    this.writeTexts(out, Kind.RemoveResponse, "remove_response_headers");
    this.writeTexts(out, Kind.Tag, "tags");
    this.writeTexts(out, Kind.RuleId, "rule_ids");
    this.writeTexts(out, Kind.ReasonCode, "reason_codes");
    this.writePairs(out, Kind.Route, "routing_metadata");
    writeChange(out, "request_body_mutation", this.requestBody);
    writeChange(out, "response_body_mutation", this.responseBody);
    if (out.size > 0) out.byte(CLOSE_OBJECT);
  }

  private add(kind: Kind, name: string, value: string): this {
    const item = new Item(kind, name, value);
    const last = this.last;
    if (last == null) this.first = item;
    else last.next = item;
    this.last = item;
    return this;
  }

  /** Removes earlier items of this name, because a JSON object must not repeat a name. */
  private remove(kind: Kind, name: string): this {
    let before: Item | null = null;
    for (let item = this.first; item != null; item = item!.next) {
      if (!item.is(kind, name)) {
        before = item;
        continue;
      }
      if (before == null) this.first = item.next;
      else before.next = item.next;
      if (item.next == null) this.last = before;
    }
    return this;
  }

  /** Writes an object. Multiple values of a name become a list. */
  private writePairs(out: Writer, kind: Kind, field: string): void {
    let any = false;
    for (let item = this.first; item != null; item = item!.next) {
      if (item.kind != kind || find(this.first, kind, item.name) != item) continue;
      if (any) {
        out.byte(COMMA);
      } else {
        writeName(out, field);
        out.byte(OPEN_OBJECT);
        any = true;
      }
      out.quoted(item.name);
      out.byte(COLON);
      if (find(item.next, kind, item.name) == null) {
        out.quoted(item.value);
        continue;
      }
      let separator = OPEN_ARRAY;
      for (let other: Item | null = item; other != null; other = find(other.next, kind, item.name)) {
        out.byte(separator);
        out.quoted(other.value);
        separator = COMMA;
      }
      out.byte(CLOSE_ARRAY);
    }
    if (any) out.byte(CLOSE_OBJECT);
  }

  private writeTexts(out: Writer, kind: Kind, field: string): void {
    let separator = OPEN_ARRAY;
    for (let item = this.first; item != null; item = item!.next) {
      if (item.kind != kind) continue;
      if (separator == OPEN_ARRAY) writeName(out, field);
      out.byte(separator);
      out.quoted(item.value);
      separator = COMMA;
    }
    if (separator != OPEN_ARRAY) out.byte(CLOSE_ARRAY);
  }
}

/** Finds the first item of this kind and name, from `item` on. */
function find(item: Item | null, kind: Kind, name: string): Item | null {
  for (; item != null; item = item!.next) {
    if (item.is(kind, name)) return item;
  }
  return null;
}

/** Begins the next field of the answer. */
function writeName(out: Writer, name: string): void {
  out.byte(out.size > 0 ? COMMA : OPEN_OBJECT);
  out.quoted(name);
  out.byte(COLON);
}

function writeChange(out: Writer, name: string, change: BodyChange | null): void {
  if (change == null) return;
  writeName(out, name);
  change.write(out);
}

function lower(code: i32): i32 {
  return code >= 0x41 && code <= 0x5a ? code | 0x20 : code;
}
