// Uses most of what a policy can read and answer. Its decisions serve no purpose.

#define ZENTINEL_IMPLEMENTATION
#include "zentinel.h"

ZN_HOOK(on_configure, config, answer) {
  if (!zn_exists(zn_get(config, "greeting"))) {
    zn_reject_configuration(answer, "missing `greeting`");
  }
}

ZN_HOOK(on_request_headers, request, answer) {
  zn_str method = zn_text(request, "method");
  zn_str uri = zn_text(request, "uri");
  char *seen = (char *)zn_scratch(method.size + 1 + uri.size);
  __builtin_memcpy(seen, method.data, method.size);
  seen[method.size] = ' ';
  __builtin_memcpy(seen + method.size + 1, uri.data, uri.size);
  zn_set_request_header_str(answer, "X-Seen", (zn_str){seen, method.size + 1 + uri.size});
  zn_append_request_header(answer, "Cookie", "tour=1");
  zn_remove_request_header(answer, "X-Debug");
  zn_set_response_header(answer, "X-Frame-Options", "DENY");
  zn_remove_response_header(answer, "Server");
  zn_tag(answer, "tour");
  zn_rule_id(answer, "T-1");
  zn_reason_code(answer, "SEEN");
  zn_confidence(answer, 0.5);
  zn_routing(answer, "upstream", "blue");
  zn_needs_more(answer);
  zn_log(ZN_INFO, "a request");
}

static zn_str and_a_byte(zn_str body, char byte) {
  char *longer = (char *)zn_scratch(body.size + 1);
  __builtin_memcpy(longer, body.data, body.size);
  longer[body.size] = byte;
  return (zn_str){longer, body.size + 1};
}

ZN_HOOK(on_request_body, request, answer) {
  zn_replace_request_body(answer, and_a_byte(zn_body(request), (char)0xff));
}

ZN_HOOK(on_response_headers, response, answer) {
  if (zn_number(response, "status", 0) >= 500) {
    zn_redirect(answer, 303, "/sorry");
    return;
  }
  zn_str cookies[8];
  size_t count = 0;
  while (count < 7 && zn_header_value(response, "set-cookie", count, &cookies[count])) {
    count += 1;
  }
  cookies[count++] = (zn_str){"tour=1", 6};
  zn_set_response_header_list(answer, "Set-Cookie", cookies, count);
  zn_append_response_header(answer, "Vary", "Cookie");
  zn_append_response_header(answer, "Vary", "Accept");
}

ZN_HOOK(on_response_body, response, answer) {
  if (zn_body(response).size == 0) {
    zn_drop_response_body(answer);
  } else {
    zn_replace_response_body(answer, and_a_byte(zn_body(response), '!'));
  }
}

ZN_HOOK(on_websocket_frame, frame, answer) {
  if (zn_equal(zn_text(frame, "opcode"), "ping")) {
    zn_drop_frame(answer);
  } else if (zn_flag(frame, "client_to_server") && zn_equal(zn_body(frame), "bye")) {
    zn_close_websocket(answer, 1008, "bye");
  }
}
