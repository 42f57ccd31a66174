// Uses most of what a policy can read and answer. Its decisions serve no purpose.

#define ZENTINEL_IMPLEMENTATION
#include "zentinel.hpp"

using zentinel::Decision;

ZN_HOOK(on_configure, config, answer) {
  if (!zentinel::Event(config).has("greeting")) {
    zn_reject_configuration(answer, "missing `greeting`");
  }
}

static Decision on_request(const zentinel::Request &request) {
  zentinel::log(ZN_INFO, "a request");
  std::string seen(request.method());
  seen.append(" ").append(request.uri());
  return Decision::allow()
      .set_request_header("X-Seen", seen)
      .append_request_header("Cookie", "tour=1")
      .remove_request_header("X-Debug")
      .set_response_header("X-Frame-Options", "DENY")
      .remove_response_header("Server")
      .tag("tour")
      .rule_id("T-1")
      .reason_code("SEEN")
      .confidence(0.5)
      .routing("upstream", "blue")
      .needs_more();
}
ZENTINEL_EXPORT(on_request_headers, zentinel::Request, on_request)

static Decision on_request_chunk(const zentinel::RequestBody &body) {
  return Decision::allow().replace_request_body(std::string(body.bytes()) + '\xff');
}
ZENTINEL_EXPORT(on_request_body, zentinel::RequestBody, on_request_chunk)

static Decision on_response(const zentinel::Response &response) {
  if (response.status() >= 500) {
    return Decision::redirect("/sorry", 303);
  }
  std::vector<std::string> cookies;
  for (std::string_view cookie : response.header_values("set-cookie")) {
    cookies.emplace_back(cookie);
  }
  cookies.emplace_back("tour=1");
  return Decision::allow()
      .set_response_header("Set-Cookie", cookies)
      .append_response_header("Vary", "Cookie")
      .append_response_header("Vary", "Accept");
}
ZENTINEL_EXPORT(on_response_headers, zentinel::Response, on_response)

static Decision on_response_chunk(const zentinel::ResponseBody &body) {
  if (body.bytes().empty()) {
    return Decision::allow().drop_response_body();
  }
  return Decision::allow().replace_response_body(std::string(body.bytes()) + '!');
}
ZENTINEL_EXPORT(on_response_body, zentinel::ResponseBody, on_response_chunk)

static Decision on_frame(const zentinel::WebsocketFrame &frame) {
  if (frame.opcode() == "ping") {
    return Decision::allow().drop_frame();
  }
  if (frame.from_client() && frame.bytes() == "bye") {
    return Decision::allow().close_websocket(1008, "bye");
  }
  return Decision::allow();
}
ZENTINEL_EXPORT(on_websocket_frame, zentinel::WebsocketFrame, on_frame)
