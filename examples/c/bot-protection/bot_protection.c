// Challenges clients that look like bots.

#define ZENTINEL_IMPLEMENTATION
#include "zentinel.h"

ZN_HOOK(on_request_headers, request, answer) {
  zn_str user_agent = zn_header(request, "User-Agent");
  if (user_agent.size == 0) {
    zn_challenge(answer, "js_challenge");
    zn_tag(answer, "no-user-agent");
  } else if (zn_contains_ignoring_case(user_agent, "bot") || zn_contains_ignoring_case(user_agent, "curl")) {
    zn_challenge(answer, "captcha");
    zn_challenge_param(answer, "site_key", "your-captcha-site-key");
    zn_tag(answer, "suspicious-ua");
  }
}
