/** Challenges clients that look like bots. */

import { Decision, Request, onRequest } from "zentinel-wasm-sdk";
export { alloc, dealloc } from "zentinel-wasm-sdk";

function check(request: Request): Decision {
  const header = request.header("User-Agent");
  const userAgent = header == null ? "" : header.toLowerCase();
  if (userAgent == "") {
    return Decision.challenge("js_challenge").tag("no-user-agent");
  }
  if (userAgent.includes("bot") || userAgent.includes("curl")) {
    return Decision.challenge("captcha").param("site_key", "your-captcha-site-key").tag("suspicious-ua");
  }
  return Decision.allow();
}

export function on_request_headers(ptr: usize, len: usize): u64 {
  return onRequest(ptr, len, check);
}
