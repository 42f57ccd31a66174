// Challenges clients that look like bots.

#define ZENTINEL_IMPLEMENTATION
#include "zentinel.hpp"

#include <algorithm>
#include <string>

static bool contains(const std::string &text, std::string_view part) { return text.find(part) != std::string::npos; }

static std::string lower_case(std::string_view text) {
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 0x20) : c; });
  return lower;
}

static zentinel::Decision check(const zentinel::Request &request) {
  std::string user_agent = lower_case(request.header("User-Agent").value_or(""));
  if (user_agent.empty()) {
    return zentinel::Decision::challenge("js_challenge").tag("no-user-agent");
  }
  if (contains(user_agent, "bot") || contains(user_agent, "curl")) {
    return zentinel::Decision::challenge("captcha").param("site_key", "your-captcha-site-key").tag("suspicious-ua");
  }
  return zentinel::Decision::allow();
}

ZENTINEL_EXPORT(on_request_headers, zentinel::Request, check)
