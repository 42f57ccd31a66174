/** What a hook decides. */

import { encode } from "./base64";
import { quote } from "./json";

/** What becomes of a request or response, and what is said about it. Each method returns the decision it was called on. */
export class Decision {
  private fields: string[] = [];
  private params: string[] = [];
  private setRequest: string[] = [];
  private removeRequest: string[] = [];
  private setResponse: string[] = [];
  private removeResponse: string[] = [];
  private tags: string[] = [];
  private ruleIds: string[] = [];
  private reasonCodes: string[] = [];
  private routes: string[] = [];

  /** Lets it go on. */
  static allow(): Decision {
    return new Decision();
  }

  /** Refuses it with an HTTP status, 100 to 599, and a body. */
  static block(status: i32, body: string = ""): Decision {
    const decision = new Decision().field("decision", '"block"').field("status", status.toString());
    return body.length > 0 ? decision.field("body", quote(body)) : decision;
  }

  /** Sends the client elsewhere, with status 301, 302, 303, 307 or 308. */
  static redirect(url: string, status: i32 = 302): Decision {
    return new Decision().field("decision", '"redirect"').field("status", status.toString()).field("body", quote(url));
  }

  /** Asks the client to prove something first, such as with a `captcha`. */
  static challenge(type: string): Decision {
    return new Decision().field("decision", '"challenge"').field("challenge_type", quote(type));
  }

  /** Adds a parameter to a challenge. */
  param(name: string, value: string): this {
    this.params.push(member(name, quote(value)));
    return this;
  }

  /** Sets a header of the request that the upstream sees. */
  setRequestHeader(name: string, value: string): this {
    this.setRequest.push(member(name, quote(value)));
    return this;
  }

  /** Removes a header from the request that the upstream sees. */
  removeRequestHeader(name: string): this {
    this.removeRequest.push(quote(name));
    return this;
  }

  /** Sets a header of the response that the client sees. */
  setResponseHeader(name: string, value: string): this {
    this.setResponse.push(member(name, quote(value)));
    return this;
  }

  /** Sets a header of the response to several values, such as Set-Cookie. */
  setResponseHeaderValues(name: string, values: string[]): this {
    const quoted: string[] = [];
    for (let at = 0; at < values.length; at++) quoted.push(quote(values[at]));
    this.setResponse.push(member(name, "[" + quoted.join(",") + "]"));
    return this;
  }

  /** Removes a header from the response that the client sees. */
  removeResponseHeader(name: string): this {
    this.removeResponse.push(quote(name));
    return this;
  }

  /** Adds a freeform tag to the audit log. */
  tag(tag: string): this {
    this.tags.push(quote(tag));
    return this;
  }

  /** Names a rule that matched in the audit log. */
  ruleId(ruleId: string): this {
    this.ruleIds.push(quote(ruleId));
    return this;
  }

  /** Adds a structured reason to the audit log. */
  reasonCode(reasonCode: string): this {
    this.reasonCodes.push(quote(reasonCode));
    return this;
  }

  /** Says how sure the decision is, from 0 to 1. A score beyond counts as the nearer of the two, NaN as 0. */
  confidence(score: f64): this {
    const clamped = isNaN(score) ? 0 : Math.min(Math.max(score, 0), 1);
    return this.field("confidence", clamped.toString());
  }

  /** Adds a hint for the choice of an upstream. */
  routing(name: string, value: string): this {
    this.routes.push(member(name, quote(value)));
    return this;
  }

  /** Says that the decision is not final: the hook for the body decides. */
  needsMore(): this {
    return this.field("needs_more", "true");
  }

  /** Replaces this chunk of the request body. */
  replaceRequestBody(text: string): this {
    return this.field("request_body_mutation", replaceText(text));
  }

  /** Replaces this chunk of the request body by bytes that need not be text. */
  replaceRequestBodyBytes(bytes: Uint8Array): this {
    return this.field("request_body_mutation", replaceBytes(bytes));
  }

  /** Leaves this chunk of the request body out. */
  dropRequestBody(): this {
    return this.field("request_body_mutation", '{"action":"drop"}');
  }

  /** Replaces this chunk of the response body. */
  replaceResponseBody(text: string): this {
    return this.field("response_body_mutation", replaceText(text));
  }

  /** Replaces this chunk of the response body by bytes that need not be text. */
  replaceResponseBodyBytes(bytes: Uint8Array): this {
    return this.field("response_body_mutation", replaceBytes(bytes));
  }

  /** Leaves this chunk of the response body out. */
  dropResponseBody(): this {
    return this.field("response_body_mutation", '{"action":"drop"}');
  }

  /** Leaves this WebSocket frame out. */
  dropFrame(): this {
    return this.field("websocket_decision", '"drop"');
  }

  /** Closes the WebSocket connection with a code (RFC 6455, 7.4) and a reason of at most 123 bytes. */
  closeWebsocket(code: i32, reason: string): this {
    return this.field(
      "websocket_decision",
      '{"close":{"code":' + code.toString() + ',"reason":' + quote(reason) + "}}",
    );
  }

  /** Sets any other field, such as `guardrail_response`, as JSON. */
  field(name: string, json: string): this {
    this.fields.push(member(name, json));
    return this;
  }

  /** The JSON that the agent is answered; empty when there is nothing to say. */
  toJson(): string {
    const fields = this.fields.slice();
    pushObject(fields, "challenge_params", this.params);
    pushObject(fields, "add_request_headers", this.setRequest);
    pushArray(fields, "remove_request_headers", this.removeRequest);
    pushObject(fields, "add_response_headers", this.setResponse);
    pushArray(fields, "remove_response_headers", this.removeResponse);
    pushArray(fields, "tags", this.tags);
    pushArray(fields, "rule_ids", this.ruleIds);
    pushArray(fields, "reason_codes", this.reasonCodes);
    pushObject(fields, "routing_metadata", this.routes);
    return fields.length == 0 ? "" : "{" + fields.join(",") + "}";
  }
}

function member(name: string, json: string): string {
  return quote(name) + ":" + json;
}

function pushObject(fields: string[], name: string, members: string[]): void {
  if (members.length > 0) fields.push(member(name, "{" + members.join(",") + "}"));
}

function pushArray(fields: string[], name: string, elements: string[]): void {
  if (elements.length > 0) fields.push(member(name, "[" + elements.join(",") + "]"));
}

function replaceText(text: string): string {
  return '{"action":"replace","data":' + quote(text) + "}";
}

function replaceBytes(bytes: Uint8Array): string {
  return '{"action":"replace","data_base64":"' + encode(bytes) + '"}';
}
