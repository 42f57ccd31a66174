//! SECURITY.md names the tests that show what it claims. Each of them must exist.

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The repository's root.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The tests of the repository, each as the parts of its path: folders, file, modules, name.
struct Tests(Vec<Vec<String>>);

impl Tests {
    fn of_repository() -> Self {
        let output = Command::new("git").current_dir(root()).args(["ls-files", "-z", "*.rs"]).output().unwrap();
        let mut tests = Self(Vec::new());
        for file in String::from_utf8(output.stdout).unwrap().split_terminator('\0') {
            // A tracked file may have been moved in the working tree.
            if let Ok(source) = fs::read_to_string(root().join(file)) {
                tests.read(file, &source);
            }
        }
        tests
    }

    fn read(&mut self, file: &str, source: &str) {
        let path: Vec<String> = file.trim_end_matches(".rs").split('/').filter(|part| *part != "mod").map(str::to_owned).collect();
        self.collect(&path, source.parse().unwrap());
    }

    fn collect(&mut self, path: &[String], items: TokenStream) {
        let within = |name: &str| [path, &[name.to_owned()]].concat();
        let items: Vec<TokenTree> = items.into_iter().collect();
        let mut is_test = false;
        for (at, item) in items.iter().enumerate() {
            match (item, &items[at + 1..]) {
                (TokenTree::Punct(mark), [TokenTree::Group(attribute), ..]) if mark.as_char() == '#' => {
                    is_test |= attribute.stream().into_iter().any(|token| token.to_string() == "test");
                }
                (TokenTree::Ident(keyword), [TokenTree::Ident(name), TokenTree::Group(items), ..]) if keyword == "mod" => {
                    self.collect(&within(&name.to_string()), items.stream());
                }
                (TokenTree::Ident(keyword), [TokenTree::Ident(name), ..]) if keyword == "fn" && std::mem::take(&mut is_test) => {
                    self.0.push(within(&name.to_string()));
                }
                // Macros that make a test of each name, or contain tests.
                (TokenTree::Punct(mark), [TokenTree::Group(body), ..]) if mark.as_char() == '!' && body.delimiter() == Delimiter::Brace => {
                    let names = body.stream().into_iter().filter(|token| matches!(token, TokenTree::Ident(_)));
                    self.0.extend(names.map(|name| within(&name.to_string())));
                    self.collect(path, body.stream());
                }
                _ => {}
            }
        }
    }

    /// Whether there is a test, or a module with tests, at `path`: `file::module::name`.
    fn contain(&self, path: &str) -> bool {
        let wanted: Vec<&str> = path.split("::").collect();
        wanted.len() > 1 && self.0.iter().any(|test| test.windows(wanted.len()).any(|window| window == wanted))
    }
}

/// The texts between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The last cells of the tables whose last column has the evidence, heads included.
fn evidence(text: &str) -> Vec<&str> {
    let mut cells = Vec::new();
    let mut in_table = false;
    for line in text.lines() {
        let cell = line.trim_end_matches('|').rsplit_once('|').map(|(_, cell)| cell.trim());
        let Some(cell) = cell.filter(|_| line.starts_with('|')) else {
            in_table = false;
            continue;
        };
        in_table |= cell.starts_with("shown by");
        if in_table {
            cells.push(cell);
        }
    }
    cells
}

/// Whether something other than a test is there: a file, a hostile module, a fuzz target, a chore.
fn is_other_evidence(name: &str) -> bool {
    let exists = |file: String| root().join(file).is_file();
    let fixtures = || fs::read_dir(root().join("fixtures/hostile")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    exists(name.into())
        || exists(format!("tests/{name}.rs"))
        || exists(format!("fuzz/fuzz_targets/{name}.rs"))
        || exists(format!("fixtures/hostile/{name}.wat"))
        || name.strip_suffix('*').is_some_and(|prefix| fixtures().any(|file| file.starts_with(prefix)))
        || name.strip_prefix("cargo xtask ").is_some_and(|chore| exists(format!("xtask/src/{chore}.rs")))
}

#[test]
fn all_evidence_in_security_md_exists() {
    let text = fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let tests = Tests::of_repository();
    let cells = evidence(&text);
    assert!(cells.len() > 30, "the tables have not been found: {cells:?}");
    let is_path =
        |name: &&str| name.contains("::") && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(c));
    let missing: Vec<&str> = cells
        .iter()
        .flat_map(|cell| quoted(cell))
        .chain(quoted(&text).filter(is_path))
        .filter(|name| !tests.contain(name) && !is_other_evidence(name))
        .collect();
    assert!(missing.is_empty(), "SECURITY.md names tests, as `file::module::name`, or files that do not exist: {missing:#?}");
}

#[test]
fn tests_are_found_by_file_module_and_name() {
    let mut tests = Tests(Vec::new());
    let source = r#"
        fn helper() {}
        mod bounds {
            #[tokio::test(flavor = "multi_thread")]
            async fn hold() { fn inner() {} }
            on_both! { twice }
            fn helper() {}
        }
        #[test]
        fn top() {}
    "#;
    tests.read("crates/a/src/sched/mod.rs", source);
    for path in ["sched::bounds::hold", "sched::bounds::twice", "sched::top", "sched::bounds"] {
        assert!(tests.contain(path), "{path}");
    }
    for path in ["hold", "sched::hold", "sched::bounds::helper", "sched::helper", "sched::bounds::inner", "other::bounds::hold"] {
        assert!(!tests.contain(path), "{path}");
    }
}

#[test]
fn evidence_is_the_last_column_of_its_tables() {
    let text =
        "`x::y`\n\n| party | trusted |\n|---|---|\n| proxy | `no` |\n\n| who | shown by `a` |\n|---|---|\n| c | `b::c`, `d` |\n\n`e`";
    assert_eq!(evidence(text).into_iter().flat_map(quoted).collect::<Vec<_>>(), ["a", "b::c", "d"]);
}
