# syntax=docker/dockerfile:1
# The agent in an empty image: one static binary and an unprivileged user.
#
#   docker build -t zentinel-wasm-agent .
#   docker run --read-only -v ./modules:/modules:ro -v sockets:/run/zentinel-agents zentinel-wasm-agent
#
# deploy/container has a compose file with the proxy, deploy/kubernetes has manifests.

FROM rust:1.95-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
COPY crates crates
COPY src src
COPY benches benches
COPY deploy/manual deploy/manual
COPY tests/e2e tests/e2e
COPY xtask xtask
# glibc is linked statically. Its files would be needed at run time only to look up users, which
# nothing here does: since glibc 2.34 it reads /etc/hosts and asks name servers without them.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    target="$(rustc -vV | sed -n 's/^host: //p')" \
    && RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --release --bin zentinel-wasm-agent --target "$target" \
    && install -D "target/$target/release/zentinel-wasm-agent" /out/usr/bin/zentinel-wasm-agent \
    # The folder for compiled modules, owned by the agent alone, and that of the socket. A new volume
    # at one of these paths gets its owner and mode.
    && install -d -m 0700 -o 65532 -g 65532 /out/cache \
    && install -d -m 0750 -o 65532 -g 65532 /out/run/zentinel-agents \
    && install -d -m 1777 /out/tmp

FROM scratch
COPY --from=build /out /
ENV AGENT_SOCKET=/run/zentinel-agents/wasm.sock \
    WASM_MODULE=/modules/wasm.wasm \
    CACHE_DIRECTORY=/cache
USER 65532:65532
STOPSIGNAL SIGTERM
# By the socket, so no port is needed. It succeeds as soon as the module decides.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s --retries=2 \
    CMD ["/usr/bin/zentinel-wasm-agent", "health"]
ENTRYPOINT ["/usr/bin/zentinel-wasm-agent"]
