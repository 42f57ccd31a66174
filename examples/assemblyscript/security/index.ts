/** Blocks all requests to `/admin`. */

import { Decision, Request, onRequest } from "zentinel-wasm-sdk";
export { alloc, dealloc } from "zentinel-wasm-sdk";

function check(request: Request): Decision {
  return request.uri.includes("/admin") ? Decision.block(403, "Forbidden") : Decision.allow();
}

export function on_request_headers(ptr: usize, len: usize): u64 {
  return onRequest(ptr, len, check);
}
