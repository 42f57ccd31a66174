/**
 * Write policies for the Zentinel proxy's Wasm agent in AssemblyScript.
 *
 * A module exports a function for each hook that it implements, and the memory functions of this
 * package:
 *
 *     import { Decision, Request, onRequest } from "zentinel-wasm-sdk";
 *     export { alloc, dealloc } from "zentinel-wasm-sdk";
 *
 *     export function on_request_headers(ptr: usize, len: usize): u64 {
 *       return onRequest(ptr, len, (request: Request) =>
 *         request.uri.includes("/admin") ? Decision.block(403, "Forbidden") : Decision.allow(),
 *       );
 *     }
 *
 * Compile it with `--runtime incremental`, which collects garbage. With `minimal` or `stub`, memory
 * grows with each call.
 */

import { Decision } from "./decision";
import { Event, Request, RequestBody, Response, ResponseBody, WebsocketFrame } from "./event";
import { quote, Value } from "./json";
import { Writer } from "./writer";

export { Level, log } from "./agent";
export { Decision } from "./decision";
export { Event, Header, Request, RequestBody, Response, ResponseBody, WebsocketFrame } from "./event";
export { Members, Value } from "./json";

/** The agent calls this to allocate memory for an event. */
export function alloc(size: usize): usize {
  return heap.alloc(max<usize>(size, 1));
}

/** The agent calls this to free the memory of an event or answer. */
export function dealloc(ptr: usize, size: usize): void {
  heap.free(ptr);
}

/** The body of `on_request_headers`. */
export function onRequest(ptr: usize, len: usize, decide: (request: Request) => Decision): u64 {
  return answer(decide(new Request(Value.parse(ptr, len))));
}

/** The body of `on_request_body`. */
export function onRequestBody(ptr: usize, len: usize, decide: (body: RequestBody) => Decision): u64 {
  return answer(decide(new RequestBody(Value.parse(ptr, len))));
}

/** The body of `on_response_headers`. */
export function onResponse(ptr: usize, len: usize, decide: (response: Response) => Decision): u64 {
  return answer(decide(new Response(Value.parse(ptr, len))));
}

/** The body of `on_response_body`. */
export function onResponseBody(ptr: usize, len: usize, decide: (body: ResponseBody) => Decision): u64 {
  return answer(decide(new ResponseBody(Value.parse(ptr, len))));
}

/** The body of `on_websocket_frame`. */
export function onWebsocketFrame(ptr: usize, len: usize, decide: (frame: WebsocketFrame) => Decision): u64 {
  return answer(decide(new WebsocketFrame(Value.parse(ptr, len))));
}

/**
 * The body of `on_guardrail_inspect` and `on_request_complete`, whose events give access to fields
 * only by name.
 */
export function onEvent(ptr: usize, len: usize, decide: (event: Event) => Decision): u64 {
  return answer(decide(new Event(Value.parse(ptr, len))));
}

/**
 * The body of `on_configure`. The function returns an error message to reject the configuration, or
 * an empty string.
 */
export function onConfigure(ptr: usize, len: usize, accept: (config: Value) => string): u64 {
  const problem = accept(Value.parse(ptr, len));
  return answer(problem.length == 0 ? Decision.allow() : Decision.allow().field("error", quote(problem)));
}

/** Returns an answer to the agent: a pointer in the upper half, a length in the lower. */
function answer(decision: Decision): u64 {
  const out = new Writer();
  decision.write(out);
  const size = out.size;
  const ptr = out.take();
  if (size > 0) return ((<u64>ptr) << 32) | (<u64>size);
  // The agent does not free an answer without a length.
  heap.free(ptr);
  return 0;
}
