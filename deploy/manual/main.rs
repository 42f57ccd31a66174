//! Writes the man pages and shell completions of the agent into a directory:
//! `cargo run --example manual -- DIRECTORY`.
//!
//! They are generated from the definition of the command line, so they are always up to date.
//! `cargo xtask dist` packs them.

use std::path::PathBuf;
use std::{env, fs, io};

use clap_complete::{Shell, generate_to};

fn main() -> io::Result<()> {
    let directory = env::args_os().nth(1).map(PathBuf::from).ok_or_else(|| io::Error::other("missing argument: output directory"))?;
    let completions = directory.join("completions");
    fs::create_dir_all(&completions)?;
    let mut command = zentinel_agent_wasm::cli::command();
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        generate_to(shell, &mut command, &name, &completions)?;
    }
    // One for the agent and one for each command. The other command has one for `help` too, because
    // the completions needed it.
    clap_mangen::generate_to(zentinel_agent_wasm::cli::command(), &directory)
}
