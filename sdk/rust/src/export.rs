//! The functions that the agent calls.

/// Makes a module of functions, each named after the hook that calls it.
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
/// Any of them may return an [`Option`] or a [`Result`] instead: see [`IntoAnswer`](crate::IntoAnswer).
///
/// With `config: Type` before them, every function takes a `&Type` as its second argument. The type implements
/// [`Default`], for a module that is not configured, and serde's `Deserialize`, for one that is; what the type refuses,
/// the agent refuses. `#[serde(try_from = "…")]` is the place for checks that types cannot make.
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
/// Outside of Wasm the macro makes a function `call_hook(hook, json)` instead, which takes and returns what the agent
/// would, for tests of the module as a whole.
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
                // SAFETY: the agent gives back what `alloc` or a hook returned, with its size.
                unsafe { $crate::__runtime::dealloc(pointer, size) }
            }
        };
        $(const _: () = {
            // Out here, for a module's own function may well have the hook's name.
            fn zentinel_call($json: &str) -> ::std::result::Result<::std::vec::Vec<u8>, ::std::string::String> {
                $call
            }

            const _: () = {
                #[unsafe(no_mangle)]
                unsafe extern "C" fn $hook(pointer: *const u8, size: usize) -> u64 {
                    // SAFETY: the agent has written `size` bytes to `pointer`, which `alloc` returned.
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
        /// Calls a hook by its name, as the agent would, and returns the JSON that it answers; none when it has no opinion.
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
#[allow(missing_docs, reason = "for the macro alone")]
pub mod runtime {
    use crate::IntoAnswer;

    /// What a hook answers: JSON, or nothing for no opinion; or why it failed.
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

        /// Where a module keeps its configuration.
        #[derive(Default)]
        pub struct Slot<T>(RefCell<Option<Rc<T>>>);

        impl<T: Default> Slot<T> {
            /// The configuration; the default one as long as there is no other.
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
        /// `pointer` was returned by [`alloc`] or [`enter`], with `size`, and is given back once.
        pub unsafe fn dealloc(pointer: *mut u8, size: usize) {
            if let (false, Ok(layout)) = (pointer.is_null(), Layout::array::<u8>(size.max(1))) {
                // SAFETY: both make their memory with this layout.
                unsafe { std::alloc::dealloc(pointer, layout) }
            }
        }

        /// Calls a hook. The answer is a pointer in the upper half and a size in the lower.
        ///
        /// # Safety
        ///
        /// There are `size` bytes at `pointer`, or `size` is 0.
        pub unsafe fn enter(pointer: *const u8, size: usize, hook: impl FnOnce(&str) -> super::Answer) -> u64 {
            static INSTALLED: AtomicBool = AtomicBool::new(false);
            if !INSTALLED.swap(true, Ordering::Relaxed) {
                logger::install();
            }
            let bytes = if size == 0 {
                &[]
            } else {
                // SAFETY: that is what the caller promises.
                unsafe { std::slice::from_raw_parts(pointer, size) }
            };
            let answer = match std::str::from_utf8(bytes) {
                Ok(json) => hook(json),
                Err(_) => Err("the event is not UTF-8".to_owned()),
            };
            match answer {
                Ok(json) if json.is_empty() => 0,
                Ok(json) => {
                    let json: &'static mut [u8] = Box::leak(json.into_boxed_slice());
                    (json.as_mut_ptr() as u64) << 32 | json.len() as u64
                }
                Err(message) => {
                    logger::log(Level::Error, &message);
                    // A trap is how a module says that it could not decide.
                    std::process::abort()
                }
            }
        }
    }
}
