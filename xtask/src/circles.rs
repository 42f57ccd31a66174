//! `cargo xtask lint --circles`: the files of a crate must not depend on each other in a circle.
//!
//! A file depends on another if its code contains a path into that file's module, in a `use` item
//! or inline. Three things are not dependencies: a `mod child;` declaration, a `pub use` of a
//! child's item that the file itself does not use, and code under `#[cfg(test)]`.

use crate::tools;
use anyhow::{Context, Result, bail};
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

/// The longest chain of imports to follow, so a loop such as `use a::a;` ends.
const MAX_IMPORTS: usize = 16;

/// Checks every crate of the repository.
pub(crate) fn check() -> Result<()> {
    let mut circles = Vec::new();
    for root in tools::tracked(&["*.rs"])?.into_iter().filter(|file| is_crate_root(file)) {
        let read = |file: &Path| std::fs::read_to_string(tools::root().join(file)).ok();
        circles.extend(Crate::read(&root, &read)?.circles());
    }
    if !circles.is_empty() {
        bail!(
            "{} circles of files; move what both files need into a third one:\n{}",
            circles.len(),
            circles.iter().map(Circle::to_string).collect::<Vec<_>>().join("\n")
        );
    }
    Ok(())
}

/// Whether this is the root file of a library or a binary. Test files are crates of their own.
fn is_crate_root(file: &Path) -> bool {
    file.ends_with("src/lib.rs") || file.ends_with("src/main.rs")
}

/// Files of which each depends on the next, and the last on the first.
struct Circle {
    files: Vec<PathBuf>,
    /// For each file, its paths into the next.
    paths: Vec<BTreeSet<String>>,
}

impl std::fmt::Display for Circle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let first = &self.files[0];
        for file in &self.files {
            write!(f, "{} → ", file.display())?;
        }
        write!(f, "{}", first.display())?;
        for (file, paths) in self.files.iter().zip(&self.paths) {
            let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
            write!(f, "\n    {}: {}", file.display(), paths.join(", "))?;
        }
        Ok(())
    }
}

/// For each file, the files that it depends on, and its paths into them.
type Dependencies = Vec<BTreeMap<usize, BTreeSet<String>>>;

/// The modules of a crate, the root first.
struct Crate {
    files: Vec<PathBuf>,
    modules: Vec<Node>,
}

/// A module: a file or a `mod` block.
struct Node {
    file: usize,
    parent: usize,
    children: BTreeMap<String, usize>,
    contents: Contents,
}

/// The parts of a module's own code that matter for dependencies.
#[derive(Default)]
struct Contents {
    imports: Vec<Import>,
    /// Inline paths of two or more segments.
    paths: BTreeSet<Vec<String>>,
    /// Names in the code outside `use` items.
    names: BTreeSet<String>,
    /// Child modules with files of their own.
    declared: Vec<String>,
    /// Child modules in blocks.
    blocks: Vec<(String, TokenStream)>,
}

/// One name that a `use` item brings into scope.
struct Import {
    /// `None` for `*`.
    name: Option<String>,
    path: Vec<String>,
    public: bool,
}

impl Crate {
    /// Reads all modules of the crate whose root file is `root`.
    fn read(root: &Path, read: &dyn Fn(&Path) -> Option<String>) -> Result<Self> {
        let mut tree = Self { files: Vec::new(), modules: Vec::new() };
        let folder = root.parent().context("the root file has no folder")?;
        tree.add_file(root, folder, 0, read)?;
        Ok(tree)
    }

    /// Adds the module in `file`, whose children have their files in `folder`.
    fn add_file(&mut self, file: &Path, folder: &Path, parent: usize, read: &dyn Fn(&Path) -> Option<String>) -> Result<usize> {
        let text = read(file).with_context(|| format!("cannot read `{}`", file.display()))?;
        let tokens: TokenStream = text.parse().map_err(|error| anyhow::anyhow!("`{}`: {error}", file.display()))?;
        self.files.push(file.to_owned());
        self.add(tokens, self.files.len() - 1, folder, parent, read)
    }

    fn add(
        &mut self,
        tokens: TokenStream,
        file: usize,
        folder: &Path,
        parent: usize,
        read: &dyn Fn(&Path) -> Option<String>,
    ) -> Result<usize> {
        let mut contents = Contents::default();
        contents.read(tokens);
        let (declared, blocks) = (std::mem::take(&mut contents.declared), std::mem::take(&mut contents.blocks));
        let this = self.modules.len();
        self.modules.push(Node { file, parent, children: BTreeMap::new(), contents });
        for name in declared {
            let inside = folder.join(&name);
            let beside = inside.with_extension("rs");
            let child = if read(&beside).is_some() { beside } else { inside.join("mod.rs") };
            let child = self.add_file(&child, &inside, this, read)?;
            self.modules[this].children.insert(name, child);
        }
        for (name, tokens) in blocks {
            let child = self.add(tokens, file, &folder.join(&name), this, read)?;
            self.modules[this].children.insert(name, child);
        }
        Ok(this)
    }

    /// The modules that a path in module `from` leads to, including those of re-exports. Empty for
    /// paths into other crates.
    fn resolve(&self, from: usize, path: &[String], imports_left: usize) -> Vec<usize> {
        let Some((first, rest)) = path.split_first() else { return vec![from] };
        match first.as_str() {
            "crate" => self.walk(0, rest, imports_left),
            "self" => self.walk(from, rest, imports_left),
            "super" => {
                let ups = path.iter().take_while(|segment| *segment == "super").count();
                let ancestor = (0..ups).fold(from, |module, _| self.modules[module].parent);
                self.walk(ancestor, &path[ups..], imports_left)
            }
            name if self.modules[from].children.contains_key(name) => self.walk(from, path, imports_left),
            name => self.follow(from, name, rest, imports_left),
        }
    }

    /// The modules that `path` leads to from `module`.
    fn walk(&self, module: usize, path: &[String], imports_left: usize) -> Vec<usize> {
        let Some((name, rest)) = path.split_first() else { return vec![module] };
        if let Some(child) = self.modules[module].children.get(name) {
            return self.walk(*child, rest, imports_left);
        }
        let mut named = vec![module];
        named.extend(self.follow(module, name, rest, imports_left));
        named
    }

    /// The modules that `name::rest` leads to if `name` is an import of `module`.
    fn follow(&self, module: usize, name: &str, rest: &[String], imports_left: usize) -> Vec<usize> {
        let import = self.modules[module].contents.imports.iter().find(|import| import.name.as_deref() == Some(name));
        match import {
            Some(import) if imports_left > 0 => self.resolve(module, &[&import.path, rest].concat(), imports_left - 1),
            _ => Vec::new(),
        }
    }

    fn is_inside(&self, mut module: usize, ancestor: usize) -> bool {
        while module != ancestor && module != 0 {
            module = self.modules[module].parent;
        }
        module == ancestor
    }

    /// The paths are those of `use` items, and inline ones only if no `use` item leads to the file.
    fn dependencies(&self) -> Dependencies {
        let mut by_use = vec![BTreeMap::new(); self.files.len()];
        let mut inline = by_use.clone();
        let add = |dependencies: &mut Dependencies, from: &Node, to: usize, path: &[String]| {
            let to = self.modules[to].file;
            if to != from.file {
                dependencies[from.file].entry(to).or_default().insert(path.join("::"));
            }
        };
        for (index, module) in self.modules.iter().enumerate() {
            let Contents { imports, paths, names, .. } = &module.contents;
            for import in imports {
                let used = import.name.as_ref().is_some_and(|name| names.contains(name));
                for to in self.resolve(index, &import.path, MAX_IMPORTS) {
                    if !import.public || used || !self.is_inside(to, index) {
                        add(&mut by_use, module, to, &import.path);
                    }
                }
            }
            for path in paths {
                for to in self.resolve(index, path, MAX_IMPORTS) {
                    add(&mut inline, module, to, path);
                }
            }
        }
        for (by_use, inline) in by_use.iter_mut().zip(inline) {
            for (to, paths) in inline {
                by_use.entry(to).or_insert(paths);
            }
        }
        by_use
    }

    /// The shortest circle through each file that is part of one, without duplicates.
    fn circles(&self) -> Vec<Circle> {
        let dependencies = self.dependencies();
        let mut found = BTreeSet::new();
        for file in 0..self.files.len() {
            if let Some(mut circle) = shortest_circle(&dependencies, file) {
                let first = circle.iter().enumerate().min_by_key(|(_, file)| **file).map_or(0, |(at, _)| at);
                circle.rotate_left(first);
                found.insert(circle);
            }
        }
        let names = |(from, to): (&usize, &usize)| dependencies[*from][to].clone();
        found
            .iter()
            .map(|circle| Circle {
                files: circle.iter().map(|file| self.files[*file].clone()).collect(),
                paths: circle.iter().zip(circle.iter().cycle().skip(1)).map(names).collect(),
            })
            .collect()
    }
}

/// The files of the shortest circle through `start`, which is the first of them.
fn shortest_circle(dependencies: &Dependencies, start: usize) -> Option<Vec<usize>> {
    let mut before = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(file) = queue.pop_front() {
        for next in dependencies[file].keys() {
            if *next == start {
                let mut circle = vec![file];
                while let Some(previous) = before.get(circle.last()?) {
                    circle.push(*previous);
                }
                circle.reverse();
                return Some(circle);
            }
            if !before.contains_key(next) {
                before.insert(*next, file);
                queue.push_back(*next);
            }
        }
    }
    None
}

impl Contents {
    /// Reads the items and expressions of a module, macro calls and definitions included.
    fn read(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            at = match &tokens[at] {
                TokenTree::Punct(punct) if punct.as_char() == '#' && is_test_attribute(tokens.get(at + 1)) => end_of_item(&tokens, at),
                TokenTree::Group(group) => {
                    self.read(group.stream());
                    at + 1
                }
                TokenTree::Ident(ident) if ident == "mod" => self.read_module(&tokens, at),
                TokenTree::Ident(ident) if ident == "use" && !is_punct(tokens.get(at + 1), '<') => self.read_use(&tokens, at),
                TokenTree::Ident(_) => self.read_path(&tokens, at),
                // A path that starts with `::` leads to another crate.
                TokenTree::Punct(_) if is_separator(&tokens, at) => at + 3,
                _ => at + 1,
            };
        }
    }

    /// Reads `mod name;` or `mod name { … }`; returns the position after it.
    fn read_module(&mut self, tokens: &[TokenTree], at: usize) -> usize {
        match (tokens.get(at + 1), tokens.get(at + 2)) {
            (Some(TokenTree::Ident(name)), Some(TokenTree::Group(group))) if group.delimiter() == Delimiter::Brace => {
                self.blocks.push((plain(name), group.stream()));
                at + 3
            }
            (Some(TokenTree::Ident(name)), end) if is_punct(end, ';') => {
                self.declared.push(plain(name));
                at + 3
            }
            _ => at + 1,
        }
    }

    /// Reads a `use` item; returns the position after it.
    fn read_use(&mut self, tokens: &[TokenTree], at: usize) -> usize {
        let end = (at..tokens.len()).find(|at| is_punct(tokens.get(*at), ';')).unwrap_or(tokens.len());
        let public = match at.checked_sub(1).map(|before| &tokens[before]) {
            Some(TokenTree::Ident(ident)) => ident == "pub",
            // `pub(crate)`. Any other group is the end of the previous item.
            Some(TokenTree::Group(group)) => group.delimiter() == Delimiter::Parenthesis,
            _ => false,
        };
        self.read_use_tree(&tokens[at + 1..end], &[], public);
        end + 1
    }

    fn read_use_tree(&mut self, tree: &[TokenTree], prefix: &[String], public: bool) {
        let mut path = prefix.to_vec();
        let mut rename = None;
        let mut at = 0;
        while at < tree.len() {
            match &tree[at] {
                TokenTree::Ident(ident) if ident == "as" => {
                    if let Some(TokenTree::Ident(name)) = tree.get(at + 1) {
                        rename = Some(plain(name));
                    }
                    break;
                }
                TokenTree::Ident(ident) => path.push(plain(ident)),
                TokenTree::Group(group) => {
                    let branches: Vec<TokenTree> = group.stream().into_iter().collect();
                    for branch in branches.split(|token| is_punct(Some(token), ',')).filter(|branch| !branch.is_empty()) {
                        self.read_use_tree(branch, &path, public);
                    }
                    return;
                }
                TokenTree::Punct(punct) if punct.as_char() == '*' => {
                    self.imports.push(Import { name: None, path, public });
                    return;
                }
                // A path that starts with `::` leads to another crate.
                _ if at == 0 && prefix.is_empty() && is_separator(tree, at) => return,
                _ => {}
            }
            at += 1;
        }
        // `use a::{self}` is `use a`, but `use super::*` keeps its keyword.
        if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
            path.pop();
        }
        let name = rename.or_else(|| path.last().cloned());
        self.imports.push(Import { name, path, public });
    }

    /// Reads a path of one or more segments; returns the position after it.
    fn read_path(&mut self, tokens: &[TokenTree], mut at: usize) -> usize {
        let mut path = Vec::new();
        while let Some(TokenTree::Ident(ident)) = tokens.get(at) {
            path.push(plain(ident));
            at += 1;
            if !is_separator(tokens, at) || !matches!(tokens.get(at + 2), Some(TokenTree::Ident(_))) {
                break;
            }
            at += 2;
        }
        self.names.extend(path.first().cloned());
        if path.len() > 1 {
            self.paths.insert(path);
        }
        // A separator before generics is not the start of a path.
        if is_separator(tokens, at) { at + 2 } else { at }
    }
}

fn plain(ident: &proc_macro2::Ident) -> String {
    let name = ident.to_string();
    name.strip_prefix("r#").map(str::to_owned).unwrap_or(name)
}

fn is_punct(token: Option<&TokenTree>, wanted: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == wanted)
}

/// Whether `::` is at this position.
fn is_separator(tokens: &[TokenTree], at: usize) -> bool {
    is_punct(tokens.get(at), ':') && is_punct(tokens.get(at + 1), ':')
}

/// Whether this is the bracket of `#[test]`, `#[cfg(test)]`, or `#[cfg(all(test, …))]`.
fn is_test_attribute(token: Option<&TokenTree>) -> bool {
    let Some(TokenTree::Group(group)) = token else { return false };
    let text = group.stream().to_string().replace(' ', "");
    text == "test" || text.starts_with("cfg(test)") || text.starts_with("cfg(all(test,")
}

/// The position after the item whose attribute is at `at`: after its block or its semicolon.
fn end_of_item(tokens: &[TokenTree], mut at: usize) -> usize {
    while at < tokens.len() {
        match &tokens[at] {
            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => return at + 1,
            TokenTree::Punct(punct) if punct.as_char() == ';' => return at + 1,
            _ => at += 1,
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The circles of a crate with these files, as text.
    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        let read = |wanted: &Path| files.iter().find(|(file, _)| Path::new(file) == wanted).map(|(_, text)| (*text).to_owned());
        let tree = Crate::read(Path::new(files[0].0), &read).unwrap();
        tree.circles().iter().map(|circle| circle.to_string().lines().next().unwrap().to_owned()).collect()
    }

    /// The circles of a crate whose root declares `a`, `b` and `c`.
    fn circles_of(a: &str, b: &str, c: &str) -> Vec<String> {
        circles(&[("lib.rs", "mod a; mod b; mod c;"), ("a.rs", a), ("b.rs", b), ("c.rs", c)])
    }

    mod finds {
        use super::*;

        #[test]
        fn two_files_that_import_each_other() {
            assert_eq!(circles_of("use crate::b::B;", "use crate::a::A;", ""), ["a.rs → b.rs → a.rs"]);
            assert_eq!(circles_of("use super::b::B;", "use super::{a::{A, self}, c};", ""), ["a.rs → b.rs → a.rs"]);
        }

        #[test]
        fn three_files_in_a_row() {
            assert_eq!(
                circles_of("use crate::b::*;", "use crate::{c as other};", "pub(crate) use crate::a;"),
                ["a.rs → b.rs → c.rs → a.rs"]
            );
        }

        #[test]
        fn inline_paths_and_those_in_macros() {
            assert_eq!(circles_of("fn f() { crate::b::g() }", "fn g() { println!(\"{}\", super::a::f()) }", ""), ["a.rs → b.rs → a.rs"]);
            assert_eq!(circles_of("use crate::{b}; fn f() { b::g::<u8>() }", "type T = crate::a::A;", ""), ["a.rs → b.rs → a.rs"]);
        }

        #[test]
        fn children_that_import_from_their_parent() {
            let files = |parent| [("lib.rs", "mod a;"), ("a.rs", parent), ("a/b.rs", "use super::f;")];
            assert_eq!(circles(&files("mod b; use b::B; fn f() {}")), ["a.rs → a/b.rs → a.rs"]);
            assert_eq!(circles(&files("mod b; fn f() { b::g() }")), ["a.rs → a/b.rs → a.rs"]);
            assert_eq!(circles(&files("mod b; pub use b::B; fn f() -> B {}")), ["a.rs → a/b.rs → a.rs"]);
        }

        #[test]
        fn imports_through_re_exports() {
            let root = "mod a; mod b; pub use a::A; pub use self::b::B;";
            let files = [("lib.rs", root), ("a.rs", "use crate::B;"), ("b.rs", "use crate::A;")];
            assert_eq!(circles(&files), ["a.rs → b.rs → a.rs"]);
        }

        #[test]
        fn modules_in_folders() {
            let files =
                [("main.rs", "mod a;"), ("a/mod.rs", "mod b; mod c;"), ("a/b.rs", "use super::c::C;"), ("a/c.rs", "use super::b::B;")];
            assert_eq!(circles(&files), ["a/b.rs → a/c.rs → a/b.rs"]);
        }
    }

    mod allows {
        use super::*;

        const NONE: [&str; 0] = [];

        #[test]
        fn imports_in_one_direction() {
            assert_eq!(circles_of("use crate::{b::B, c::C};", "use crate::c::C; use std::a::A; use ::a::A;", "fn a() {}"), NONE);
        }

        #[test]
        fn declarations_and_re_exports_in_the_parent() {
            let parent = "mod b; pub use b::B; pub(crate) use b::{C, D}; fn f() {}";
            assert_eq!(circles(&[("lib.rs", "mod a;"), ("a.rs", parent), ("a/b.rs", "use super::f;")]), NONE);
        }

        #[test]
        fn imports_of_tests() {
            assert_eq!(
                circles_of("use crate::b::B;", "#[cfg(test)] use crate::a::A; #[cfg(test)] mod tests { use crate::a::A; }", ""),
                NONE
            );
        }

        #[test]
        fn blocks_of_one_file() {
            assert_eq!(circles_of("use self::inner::I; struct A; mod inner { use super::A; }", "", ""), NONE);
        }
    }

    #[test]
    fn names_the_paths_that_tie_a_circle() {
        let files = [("lib.rs", "mod a; mod b;"), ("a.rs", "use crate::b::{B, C};"), ("b.rs", "use super::a;")];
        let read = |wanted: &Path| files.iter().find(|(file, _)| Path::new(file) == wanted).map(|(_, text)| (*text).to_owned());
        let found = Crate::read(Path::new("lib.rs"), &read).unwrap().circles();
        assert_eq!(found[0].to_string(), "a.rs → b.rs → a.rs\n    a.rs: crate::b::B, crate::b::C\n    b.rs: super::a");
    }
}
