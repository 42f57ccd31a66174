// zentinel.hpp - write policies for the Zentinel proxy's Wasm agent in C++17.
//
// Copy this file and zentinel.h into your project. In exactly one source file, define
// ZENTINEL_IMPLEMENTATION before you include it.
//
//     #define ZENTINEL_IMPLEMENTATION
//     #include "zentinel.hpp"
//
//     static zentinel::Decision check(const zentinel::Request &request) {
//       if (request.uri().find("/admin") != std::string_view::npos) {
//         return zentinel::Decision::block(403, "Forbidden");
//       }
//       return zentinel::Decision::allow();
//     }
//     ZENTINEL_EXPORT(on_request_headers, zentinel::Request, check)
//
// The values that an event returns are valid until the hook returns.
//
// SPDX-License-Identifier: Apache-2.0

#ifndef ZENTINEL_HPP
#define ZENTINEL_HPP

#include "zentinel.h"

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace zentinel {

inline std::string_view view(zn_str text) { return {text.data, text.size}; }
inline zn_str str(std::string_view text) { return {text.data(), text.size()}; }

// Writes a line to the agent's log.
inline void log(zn_level level, const std::string &message) { zn_log(level, message.c_str()); }

// The base of all events: access to fields by name.
class Event {
public:
  explicit Event(zn_value json) : json_(json) {}

  // Identifies the request in logs. The client may have chosen it.
  std::string_view correlation_id() const { return text("correlation_id"); }

  // Fields by name. A missing field is empty, 0 or false.
  std::string_view text(const char *name) const { return view(zn_text(json_, name)); }
  std::uint64_t number(const char *name) const { return zn_number(json_, name, 0); }
  bool flag(const char *name) const { return zn_flag(json_, name); }
  bool has(const char *name) const { return zn_exists(zn_get(json_, name)); }

  zn_value json() const { return json_; }

private:
  zn_value json_;
};

// The base of requests and responses. For a response, the agent may not know the method, URI and
// address.
class Message : public Event {
public:
  using Event::Event;

  std::string_view method() const { return text("method"); }
  // The path and query.
  std::string_view uri() const { return text("uri"); }
  // The client's address, without a port.
  std::string_view client_ip() const { return text("client_ip"); }

  // The value of a header. Ignores the case of the name. Multiple values are joined.
  std::optional<std::string_view> header(const char *name) const {
    if (!zn_has_header(json(), name)) {
      return std::nullopt;
    }
    return view(zn_header(json(), name));
  }

  // Each value of a header, for headers whose values cannot be joined, such as Set-Cookie.
  std::vector<std::string_view> header_values(const char *name) const {
    std::vector<std::string_view> values;
    zn_str value;
    while (zn_header_value(json(), name, values.size(), &value)) {
      values.push_back(view(value));
    }
    return values;
  }
};

// A request whose headers have arrived.
class Request : public Message {
public:
  using Message::Message;

  // The URI without the query.
  std::string_view path() const {
    std::string_view all = uri();
    return all.substr(0, all.find('?'));
  }
};

// A response whose headers have arrived.
class Response : public Message {
public:
  using Message::Message;

  unsigned status() const { return static_cast<unsigned>(number("status")); }
};

// A chunk of a body, with its request or response as far as the agent knows it.
template <class Base> class Body : public Base {
public:
  using Base::Base;

  // The bytes of this chunk.
  std::string_view bytes() const { return view(zn_body(this->json())); }
  std::uint64_t chunk_index() const { return this->number("chunk_index"); }
  bool is_last() const { return this->flag("is_last"); }
};

using RequestBody = Body<Request>;
using ResponseBody = Body<Response>;

// A WebSocket frame.
class WebsocketFrame : public Event {
public:
  using Event::Event;

  // text, binary, ping, pong, close or continuation.
  std::string_view opcode() const { return text("opcode"); }
  std::string_view bytes() const { return view(zn_body(json())); }
  bool from_client() const { return flag("client_to_server"); }
};

// The decision of a hook. Each method returns the decision that it was called on.
class Decision {
public:
  // Allows the request or response.
  static Decision allow() { return Decision(Action::allow); }
  // Rejects the request or response with an HTTP status, 200 to 599.
  static Decision block(unsigned status, std::string body = {}) {
    return Decision(Action::block, status, std::move(body));
  }
  // Redirects the client with status 301, 302, 303, 307 or 308.
  static Decision redirect(std::string url, unsigned status = 302) {
    return Decision(Action::redirect, status, std::move(url));
  }
  // Challenges the client, for example with a "captcha".
  static Decision challenge(std::string type) { return Decision(Action::challenge, 0, std::move(type)); }

  Decision &param(std::string name, std::string value) { return add(params_, name, value); }
  Decision &set_request_header(std::string name, std::string value) { return add(set_request_, name, value); }
  // Appends a value to a header and keeps the existing values.
  Decision &append_request_header(std::string name, std::string value) { return add(append_request_, name, value); }
  Decision &remove_request_header(std::string name) { return add(remove_request_, name); }
  Decision &set_response_header(std::string name, std::string value) {
    std::vector<std::string> values;
    values.push_back(std::move(value));
    return set_response_header(std::move(name), std::move(values));
  }
  // Sets a header, such as Set-Cookie, to several values.
  Decision &set_response_header(std::string name, std::vector<std::string> values) {
    set_response_.emplace_back(std::move(name), std::move(values));
    return *this;
  }
  // Appends a value to a header and keeps the existing values, such as the cookies of the
  // upstream.
  Decision &append_response_header(std::string name, std::string value) { return add(append_response_, name, value); }
  Decision &remove_response_header(std::string name) { return add(remove_response_, name); }

  // For the audit log.
  Decision &tag(std::string tag) { return add(tags_, tag); }
  Decision &rule_id(std::string rule_id) { return add(rule_ids_, rule_id); }
  Decision &reason_code(std::string reason_code) { return add(reason_codes_, reason_code); }
  Decision &confidence(double from_0_to_1) {
    confidence_ = from_0_to_1;
    return *this;
  }

  Decision &routing(std::string name, std::string value) { return add(routing_, name, value); }
  // Marks the decision as not final: the hook for the body decides.
  Decision &needs_more() {
    needs_more_ = true;
    return *this;
  }
  Decision &replace_request_body(std::string body) {
    request_body_ = BodyChange{false, std::move(body)};
    return *this;
  }
  Decision &drop_request_body() {
    request_body_ = BodyChange{true, {}};
    return *this;
  }
  Decision &replace_response_body(std::string body) {
    response_body_ = BodyChange{false, std::move(body)};
    return *this;
  }
  // The agent treats this as a module error unless the chunk is empty, because the proxy would
  // send the original.
  Decision &drop_response_body() {
    response_body_ = BodyChange{true, {}};
    return *this;
  }
  Decision &drop_frame() {
    drop_frame_ = true;
    return *this;
  }
  Decision &close_websocket(unsigned code, std::string reason) {
    close_ = {code, std::move(reason)};
    return *this;
  }

  void write(zn_answer *answer) const {
    switch (action_) {
    case Action::allow:
      break;
    case Action::block:
      zn_block_str(answer, status_, str(text_));
      break;
    case Action::redirect:
      zn_redirect_str(answer, status_, str(text_));
      break;
    case Action::challenge:
      zn_challenge(answer, text_.c_str());
      break;
    }
    write_pairs(answer, params_, zn_challenge_param_str);
    write_pairs(answer, set_request_, zn_set_request_header_str);
    write_pairs(answer, append_request_, zn_append_request_header_str);
    write_items(answer, remove_request_, zn_remove_request_header);
    for (const auto &[name, values] : set_response_) {
      std::vector<zn_str> list;
      for (const std::string &value : values) {
        list.push_back(str(value));
      }
      zn_set_response_header_list(answer, name.c_str(), list.data(), list.size());
    }
    write_pairs(answer, append_response_, zn_append_response_header_str);
    write_items(answer, remove_response_, zn_remove_response_header);
    write_items(answer, tags_, zn_tag);
    write_items(answer, rule_ids_, zn_rule_id);
    write_items(answer, reason_codes_, zn_reason_code);
    if (confidence_) {
      zn_confidence(answer, *confidence_);
    }
    for (const auto &[name, value] : routing_) {
      zn_routing(answer, name.c_str(), value.c_str());
    }
    if (needs_more_) {
      zn_needs_more(answer);
    }
    if (request_body_) {
      request_body_->drop ? zn_drop_request_body(answer) : zn_replace_request_body(answer, str(request_body_->data));
    }
    if (response_body_) {
      response_body_->drop ? zn_drop_response_body(answer)
                           : zn_replace_response_body(answer, str(response_body_->data));
    }
    if (close_) {
      zn_close_websocket(answer, close_->first, close_->second.c_str());
    } else if (drop_frame_) {
      zn_drop_frame(answer);
    }
  }

private:
  enum class Action { allow, block, redirect, challenge };
  struct BodyChange {
    bool drop;
    std::string data;
  };
  using Pairs = std::vector<std::pair<std::string, std::string>>;
  using Items = std::vector<std::string>;

  explicit Decision(Action action, unsigned status = 0, std::string text = {})
      : action_(action), status_(status), text_(std::move(text)) {}

  Decision &add(Pairs &pairs, std::string &name, std::string &value) {
    pairs.emplace_back(std::move(name), std::move(value));
    return *this;
  }

  Decision &add(Items &items, std::string &item) {
    items.push_back(std::move(item));
    return *this;
  }

  static void write_pairs(zn_answer *answer, const Pairs &pairs, void (*write)(zn_answer *, const char *, zn_str)) {
    for (const auto &[name, value] : pairs) {
      write(answer, name.c_str(), str(value));
    }
  }

  static void write_items(zn_answer *answer, const Items &items, void (*write)(zn_answer *, const char *)) {
    for (const std::string &item : items) {
      write(answer, item.c_str());
    }
  }

  Action action_;
  unsigned status_;
  std::string text_; // the body, URL or challenge type
  Pairs params_, set_request_, append_request_, append_response_, routing_;
  std::vector<std::pair<std::string, std::vector<std::string>>> set_response_;
  Items remove_request_, remove_response_, tags_, rule_ids_, reason_codes_;
  std::optional<double> confidence_;
  bool needs_more_ = false;
  bool drop_frame_ = false;
  std::optional<BodyChange> request_body_, response_body_;
  std::optional<std::pair<unsigned, std::string>> close_;
};

} // namespace zentinel

// Exports `function`, a `zentinel::Decision (const Event &)`, as a hook.
#define ZENTINEL_EXPORT(hook, Event, function)                                                                         \
  ZN_HOOK(hook, event, answer) { function(Event(event)).write(answer); }

#endif // ZENTINEL_HPP
