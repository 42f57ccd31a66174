/** What the hooks are given. An event may be used only until its hook returns. */

import { Members, Value } from "./json";

/** A header's name and value. */
export class Header {
  constructor(
    readonly name: string,
    readonly value: string,
  ) {}
}

/** What every event has: named fields. */
export class Event {
  constructor(readonly json: Value) {}

  /** The text of a field; empty when it is missing. */
  text(name: string): string {
    return this.json.get(name).text;
  }

  /** A whole number; `otherwise` when the field is missing or something else. */
  number(name: string, otherwise: u64 = 0): u64 {
    return this.json.get(name).number(otherwise);
  }

  /** Whether a field is true. */
  flag(name: string): bool {
    return this.json.get(name).flag;
  }

  /** The request's name in logs. The client may have chosen it. */
  get correlationId(): string {
    return this.text("correlation_id");
  }
}

/** An event that has headers. Their names are compared without regard to case. */
export class Message extends Event {
  /** The value of a header, or null. Several values come joined: with `; ` for Cookie, else with `, `. */
  header(name: string): string | null {
    const value = this.json.get("headers").get(name, true);
    return value.isText ? value.text : null;
  }

  /** Each value of a header, for headers such as Set-Cookie whose values cannot be joined. */
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

  /** All headers, several values of one joined. */
  get headers(): Header[] {
    const headers: Header[] = [];
    const each = new Members(this.json.get("headers"));
    while (each.next()) headers.push(new Header(each.name, each.value.text));
    return headers;
  }

  /** The method of the request; of a response's, where the agent knows it. */
  get method(): string {
    return this.text("method");
  }

  /** Path and query of the request; of a response's, where the agent knows them. */
  get uri(): string {
    return this.text("uri");
  }

  /** The client's address; for a response, where the agent knows it. */
  get clientIp(): string {
    return this.text("client_ip");
  }

  // The parts of a body are read alike for both directions.

  /** The text of this chunk of the body. Bytes that are not UTF-8 are replaced by U+FFFD. */
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
  /** The path: the URI without its query. */
  get path(): string {
    const uri = this.uri;
    const query = uri.indexOf("?");
    return query < 0 ? uri : uri.substring(0, query);
  }
}

/** A part of a request's body, with the request it belongs to as far as the agent knows it. */
export class RequestBody extends Request {
  get body(): string {
    return this.chunkText();
  }

  /** Whether this chunk is text, and no bytes that are not UTF-8. */
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

/** A part of a response's body, with the response it belongs to as far as the agent knows it. */
export class ResponseBody extends Response {
  get body(): string {
    return this.chunkText();
  }

  /** Whether this chunk is text, and no bytes that are not UTF-8. */
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

/** A frame of an upgraded connection. */
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
