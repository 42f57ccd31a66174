/** Uses most of what a policy can read and answer. Its decisions serve no purpose. */

import {
  Decision,
  Level,
  Request,
  RequestBody,
  Response,
  ResponseBody,
  Value,
  WebsocketFrame,
  log,
  onConfigure,
  onRequest,
  onRequestBody,
  onResponse,
  onResponseBody,
  onWebsocketFrame,
} from "zentinel-wasm-sdk";
export { alloc, dealloc } from "zentinel-wasm-sdk";

export function on_configure(ptr: usize, len: usize): u64 {
  return onConfigure(ptr, len, (config: Value) => (config.get("greeting").exists ? "" : "missing `greeting`"));
}

export function on_request_headers(ptr: usize, len: usize): u64 {
  return onRequest(ptr, len, (request: Request) => {
    log(Level.Info, "a request");
    console.debug("at " + Date.now().toString() + ", random " + Math.random().toString());
    return Decision.allow()
      .setRequestHeader("X-Seen", request.method + " " + request.uri)
      .appendRequestHeader("Cookie", "tour=1")
      .removeRequestHeader("X-Debug")
      .setResponseHeader("X-Frame-Options", "DENY")
      .removeResponseHeader("Server")
      .tag("tour")
      .ruleId("T-1")
      .reasonCode("SEEN")
      .confidence(0.5)
      .routing("upstream", "blue")
      .needsMore();
  });
}

export function on_request_body(ptr: usize, len: usize): u64 {
  return onRequestBody(ptr, len, (body: RequestBody) => {
    const bytes = body.bytes;
    const longer = new Uint8Array(bytes.length + 1);
    longer.set(bytes);
    longer[bytes.length] = 0xff;
    return Decision.allow().replaceRequestBodyBytes(longer);
  });
}

export function on_response_headers(ptr: usize, len: usize): u64 {
  return onResponse(ptr, len, (response: Response) => {
    if (response.status >= 500) return Decision.redirect("/sorry", 303);
    const cookies = response.headerValues("set-cookie");
    cookies.push("tour=1");
    return Decision.allow()
      .setResponseHeaderValues("Set-Cookie", cookies)
      .appendResponseHeader("Vary", "Cookie")
      .appendResponseHeader("Vary", "Accept");
  });
}

export function on_response_body(ptr: usize, len: usize): u64 {
  return onResponseBody(ptr, len, (body: ResponseBody) => {
    if (body.isText && body.body.length == 0) return Decision.allow().dropResponseBody();
    if (body.isText) return Decision.allow().replaceResponseBody(body.body + "!");
    const bytes = body.bytes;
    const longer = new Uint8Array(bytes.length + 1);
    longer.set(bytes);
    longer[bytes.length] = 0x21;
    return Decision.allow().replaceResponseBodyBytes(longer);
  });
}

export function on_websocket_frame(ptr: usize, len: usize): u64 {
  return onWebsocketFrame(ptr, len, (frame: WebsocketFrame) => {
    if (frame.opcode == "ping") return Decision.allow().dropFrame();
    const bytes = frame.bytes;
    const text = String.UTF8.decodeUnsafe(bytes.dataStart, bytes.length);
    return frame.fromClient && text == "bye" ? Decision.allow().closeWebsocket(1008, "bye") : Decision.allow();
  });
}
