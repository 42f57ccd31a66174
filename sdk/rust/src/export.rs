//! Exports the functions that the agent calls.

/// Exports functions as the hooks of a module.
///
/// | hook | function |
/// |---|---|
/// | `on_request_headers` | `fn(&Request) -> Decision` |
/// | `on_request_body` | `fn(&RequestBody) -> Decision` |
/// | `on_response_headers` | `fn(&Response) -> Decision` |
/// | `on_response_body` | `fn(&ResponseBody) -> Decision` |
/// | `on_websocket_frame` | `fn(&WebsocketFrame) -> Decision` |
/// | `on_guardrail_inspect` | `fn(&Guardrail) -> Inspection` |
/// | `on_request_complete` | `fn(&Completion)` |
///
/// Each function may return an [`Option`] or a [`Result`] of this type instead: see
/// [`IntoAnswer`](crate::IntoAnswer).
///
/// If the first entry is `config: Type`, every function takes a `&Type` as its second argument. The
/// type implements [`Default`], which is used until the module is configured, and serde's
/// `Deserialize`. The agent rejects a configuration that fails to deserialize. Use
/// `#[serde(try_from = "…")]` for checks that types cannot express.
///
/// ```
/// use serde::Deserialize;
/// use zentinel_wasm_sdk::{Decision, Request};
///
/// #[derive(Default, Deserialize)]
/// #[serde(default, deny_unknown_fields)]
/// struct Config {
///     closed_paths: Vec<String>,
/// }
///
/// fn check(request: &Request<'_>, config: &Config) -> Decision {
///     if config.closed_paths.iter().any(|path| request.path().starts_with(path)) {
///         return Decision::block(404);
///     }
///     Decision::allow()
/// }
///
/// zentinel_wasm_sdk::export! {
///     config: Config,
///     on_request_headers: check,
/// }
/// ```
///
/// On targets other than Wasm, the macro defines a function `call_hook(hook, json)` instead, for
/// tests of the whole module. It takes the JSON of the agent and returns the JSON of the module.
#[macro_export]
macro_rules! export {
    (config: $config:ty, $($hook:ident: $function:path),+ $(,)?) => {
        ::std::thread_local! {
            static ZENTINEL_CONFIG: $crate::__runtime::Slot<$config> = ::std::default::Default::default();
        }
        $crate::__export! {
            on_configure: |json| ZENTINEL_CONFIG.with(|slot| $crate::__runtime::configure(slot, json)),
            $($hook: |json| ZENTINEL_CONFIG.with(|slot| {
                let config = slot.get();
                $crate::__runtime::$hook(json, |event| $function(event, &config))
            }),)+
        }
    };
    ($($hook:ident: $function:path),+ $(,)?) => {
        $crate::__export! {
            $($hook: |json| $crate::__runtime::$hook(json, |event| $function(event)),)+
        }
    };
}

#[cfg(target_family = "wasm")]
#[doc(hidden)]
#[macro_export]
macro_rules! __export {
    ($($hook:ident: |$json:ident| $call:expr,)+) => {
        const _: () = {
            #[unsafe(no_mangle)]
            extern "C" fn alloc(size: usize) -> *mut u8 {
                $crate::__runtime::alloc(size)
            }

            #[unsafe(no_mangle)]
            unsafe extern "C" fn dealloc(pointer: *mut u8, size: usize) {
                // SAFETY: the agent passes a pointer that `alloc` or a hook returned, and its size.
                unsafe { $crate::__runtime::dealloc(pointer, size) }
            }
        };
        $(const _: () = {
            // Outside of the inner block, because the module's own function may have the name
            // of the hook.
            fn zentinel_call($json: &str) -> ::std::result::Result<::std::vec::Vec<u8>, ::std::string::String> {
                $call
            }

            const _: () = {
                #[unsafe(no_mangle)]
                unsafe extern "C" fn $hook(pointer: *const u8, size: usize) -> u64 {
                    // SAFETY: the agent wrote `size` bytes to `pointer`, which `alloc` returned.
                    unsafe { $crate::__runtime::enter(pointer, size, zentinel_call) }
                }
            };
        };)+
    };
}

#[cfg(not(target_family = "wasm"))]
#[doc(hidden)]
#[macro_export]
macro_rules! __export {
    ($($hook:ident: |$json:ident| $call:expr,)+) => {
        /// Calls a hook by its name as the agent would. Returns the JSON of the answer, or `None`
        /// if the hook has no opinion.
        #[allow(dead_code)]
        pub fn call_hook(hook: &str, json: &str) -> ::std::result::Result<::std::option::Option<String>, String> {
            let answer = match hook {
                $(stringify!($hook) => { let $json = json; $call })+
                _ => Err(::std::format!("the module has no hook `{hook}`")),
            };
            answer.map(|json| $crate::__runtime::text(json))
        }
    };
}

#[doc(hidden)]
#[allow(missing_docs, reason = "only the macro uses it")]
pub mod runtime {
    use crate::IntoAnswer;

    /// The answer of a hook: JSON, empty for no opinion, or why the hook failed.
    type Answer = Result<Vec<u8>, String>;

    macro_rules! hooks {
        ($($hook:ident: $event:ident),+ $(,)?) => {
            $(pub fn $hook<T: IntoAnswer>(json: &str, function: impl FnOnce(&crate::$event<'_>) -> T) -> Answer {
                match crate::$event::parse(json) {
                    Ok(event) => function(&event).into_answer(),
                    Err(error) => Err(error.to_string()),
                }
            })+
        };
    }

    hooks! {
        on_request_headers: Request,
        on_request_body: RequestBody,
        on_response_headers: Response,
        on_response_body: ResponseBody,
        on_websocket_frame: WebsocketFrame,
        on_guardrail_inspect: Guardrail,
        on_request_complete: Completion,
    }

    #[cfg(feature = "config")]
    pub use config::{Slot, configure};

    #[cfg(feature = "config")]
    mod config {
        use std::cell::RefCell;
        use std::rc::Rc;

        /// The configuration of a module.
        #[derive(Default)]
        pub struct Slot<T>(RefCell<Option<Rc<T>>>);

        impl<T: Default> Slot<T> {
            /// Returns the configuration, or the default until one is set.
            pub fn get(&self) -> Rc<T> {
                Rc::clone(self.0.borrow_mut().get_or_insert_default())
            }
        }

        pub fn configure<T: serde::de::DeserializeOwned>(slot: &Slot<T>, json: &str) -> super::Answer {
            match serde_json::from_str(json) {
                Ok(config) => {
                    slot.0.replace(Some(Rc::new(config)));
                    Ok(Vec::new())
                }
                Err(error) => {
                    let mut out = b"{\"error\":".to_vec();
                    crate::json::write_string(&mut out, &error.to_string());
                    out.push(b'}');
                    Ok(out)
                }
            }
        }
    }

    #[cfg(not(target_family = "wasm"))]
    pub fn text(json: Vec<u8>) -> Option<String> {
        String::from_utf8(json).ok().filter(|json| !json.is_empty())
    }

    #[cfg(target_family = "wasm")]
    pub use abi::{alloc, dealloc, enter};

    #[cfg(target_family = "wasm")]
    #[allow(unsafe_code, reason = "the agent passes pointers")]
    mod abi {
        use std::alloc::Layout;
        use std::sync::atomic::{AtomicBool, Ordering};

        use crate::logger::{self, Level};

        pub fn alloc(size: usize) -> *mut u8 {
            match Layout::array::<u8>(size.max(1)) {
                // SAFETY: the layout is not empty.
                Ok(layout) => unsafe { std::alloc::alloc(layout) },
                Err(_) => std::ptr::null_mut(),
            }
        }

        /// # Safety
        ///
        /// `pointer` must come from [`alloc`] or [`enter`] with this `size`, and be freed once.
        pub unsafe fn dealloc(pointer: *mut u8, size: usize) {
            if let (false, Ok(layout)) = (pointer.is_null(), Layout::array::<u8>(size.max(1))) {
                // SAFETY: both functions allocate with this layout.
                unsafe { std::alloc::dealloc(pointer, layout) }
            }
        }

        /// Calls a hook. Returns a pointer in the upper half and a size in the lower.
        ///
        /// # Safety
        ///
        /// `pointer` must point to `size` bytes, unless `size` is 0.
        pub unsafe fn enter(pointer: *const u8, size: usize, hook: impl FnOnce(&str) -> super::Answer) -> u64 {
            static INSTALLED: AtomicBool = AtomicBool::new(false);
            if !INSTALLED.swap(true, Ordering::Relaxed) {
                logger::install();
            }
            let bytes = if size == 0 {
                &[]
            } else {
                // SAFETY: the caller guarantees it.
                unsafe { std::slice::from_raw_parts(pointer, size) }
            };
            let answer = match std::str::from_utf8(bytes) {
                Ok(json) => hook(json),
                Err(_) => Err("the event is not valid UTF-8".to_owned()),
            };
            match answer {
                Ok(json) if json.is_empty() => 0,
                Ok(json) => {
                    let json: &'static mut [u8] = Box::leak(json.into_boxed_slice());
                    (json.as_mut_ptr() as u64) << 32 | json.len() as u64
                }
                Err(message) => {
                    logger::log(Level::Error, &message);
                    // A trap is how a module reports that it could not decide.
                    std::process::abort()
                }
            }
        }
    }
}
