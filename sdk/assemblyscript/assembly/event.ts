/** Events, which the hooks take. An event is valid only until its hook returns. */

import { Members, Value } from "./json";

/** The name and value of a header. */
export class Header {
  constructor(
    readonly name: string,
    readonly value: string,
  ) {}
}

/** The base of all events: access to fields by name. */
export class Event {
  constructor(readonly json: Value) {}

  /** The text of a field; empty if it is missing or not a string. */
  text(name: string): string {
    return this.json.get(name).text;
  }

  /** The value of a field if it is a non-negative integer, else `otherwise`. */
  number(name: string, otherwise: u64 = 0): u64 {
    return this.json.get(name).number(otherwise);
  }

  /** Whether a field is true. */
  flag(name: string): bool {
    return this.json.get(name).flag;
  }

  /** Identifies the request in logs. The client may have chosen it. */
  get correlationId(): string {
    return this.text("correlation_id");
  }
}

/** An event with headers. Their names are compared case-insensitively. */
export class Message extends Event {
  /**
   * The value of a header, or null. Multiple values are joined with `; ` for Cookie, otherwise with
   * `, `.
   */
  header(name: string): string | null {
    const value = this.json.get("headers").get(name, true);
    return value.isText ? value.text : null;
  }

  /** Each value of a header, for headers whose values cannot be joined, such as Set-Cookie. */
  headerValues(name: string): string[] {
    const values: string[] = [];
    const list = this.json.get("header_values").get(name, true);
    if (list.exists) {
      const elements = list.elements;
      for (let at = 0; at < elements.length; at++) values.push(elements[at].text);
      return values;
    }
    const value = this.header(name);
    if (value != null) values.push(value);
    return values;
  }

  /** All headers. Multiple values of a header are joined. */
  get headers(): Header[] {
    const headers: Header[] = [];
    const each = new Members(this.json.get("headers"));
    while (each.next()) headers.push(new Header(each.name, each.value.text));
    return headers;
  }

  /** The method of the request. For a response, empty if the agent does not know it. */
  get method(): string {
    return this.text("method");
  }

  /** The path and query of the request. For a response, empty if the agent does not know them. */
  get uri(): string {
    return this.text("uri");
  }

  /** The client's address. For a response, empty if the agent does not know it. */
  get clientIp(): string {
    return this.text("client_ip");
  }

  // Request and response bodies share these.

  /** The text of this chunk of the body. Invalid UTF-8 becomes U+FFFD. */
  protected chunkText(): string {
    if (this.text("body_encoding") != "base64") return this.text("body");
    const bytes = this.chunkBytes();
    return String.UTF8.decodeUnsafe(bytes.dataStart, bytes.length);
  }

  protected chunkBytes(): Uint8Array {
    const body = this.json.get("body");
    return this.text("body_encoding") == "base64" ? body.base64 : body.utf8;
  }
}

/** A request whose headers have arrived. */
export class Request extends Message {
  /** The path: the URI without the query. */
  get path(): string {
    const uri = this.uri;
    const query = uri.indexOf("?");
    return query < 0 ? uri : uri.substring(0, query);
  }
}

/** A chunk of a request body, with the request as far as the agent knows it. */
export class RequestBody extends Request {
  get body(): string {
    return this.chunkText();
  }

  /** Whether this chunk is valid UTF-8. */
  get isText(): bool {
    return this.text("body_encoding") != "base64";
  }

  get bytes(): Uint8Array {
    return this.chunkBytes();
  }

  get chunkIndex(): u64 {
    return this.number("chunk_index");
  }

  get isLast(): bool {
    return this.flag("is_last");
  }
}

/** A response whose headers have arrived. */
export class Response extends Message {
  get status(): i32 {
    return <i32>this.number("status");
  }
}

/** A chunk of a response body, with the response as far as the agent knows it. */
export class ResponseBody extends Response {
  get body(): string {
    return this.chunkText();
  }

  /** Whether this chunk is valid UTF-8. */
  get isText(): bool {
    return this.text("body_encoding") != "base64";
  }

  get bytes(): Uint8Array {
    return this.chunkBytes();
  }

  get chunkIndex(): u64 {
    return this.number("chunk_index");
  }

  get isLast(): bool {
    return this.flag("is_last");
  }
}

/** A WebSocket frame. */
export class WebsocketFrame extends Event {
  /** `text`, `binary`, `ping`, `pong`, `close` or `continuation`. */
  get opcode(): string {
    return this.text("opcode");
  }

  get fromClient(): bool {
    return this.flag("client_to_server");
  }

  get bytes(): Uint8Array {
    const data = this.json.get("data");
    return this.text("data_encoding") == "base64" ? data.base64 : data.utf8;
  }
}
