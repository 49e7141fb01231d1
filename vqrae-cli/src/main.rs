//! The command line: photos into codes, codes into photos.
//!
//! Words become a checked plan (`plan`), the plan is carried out (`commands`), and what happens is told in one place
//! (`report`). `main` turns the result into an exit code.

mod alike;
mod atlas;
mod commands;
mod crop;
mod device;
mod figure;
mod hub;
mod inputs;
mod interrupts;
mod layouts;
mod load;
mod memory;
mod output;
mod pipeline;
mod plan;
mod report;
mod shards;
mod sheet;
mod view;
mod vocabulary;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::commands::{
    bench, cache, codebook, convert, eval, export, features, generate, init, inspect, reconstruct, tokenize, train,
    verify, vocab,
};
use crate::report::{Exit, LogFormat};

/// Turn photos into codes and codes into photos
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Cli {
    /// How progress and messages are written to stderr
    #[arg(long, alias = "log_format", value_enum, global = true, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 all done, 1 error, 2 words that make no sense, 3 done but for files that could not be read, \
130 interrupted (what is written is whole).
Results go to stdout, everything else to stderr.";

#[derive(Subcommand)]
enum Command {
    Tokenize(tokenize::Args),
    Verify(verify::Args),
    Reconstruct(reconstruct::Args),
    Eval(eval::Args),
    Features(features::Args),
    Generate(generate::Args),
    Inspect(inspect::Args),
    Codebook(codebook::Args),
    Init(init::Args),
    Convert(convert::Args),
    Vocab(vocab::Args),
    Export(export::Args),
    Train(train::Args),
    Bench(bench::Args),
    Cache(cache::Args),
}

fn main() -> ExitCode {
    let words = Cli::parse();
    report::set_format(words.log_format);
    run(words.command)
        .unwrap_or_else(|error| {
            report::failure(&error);
            Exit::Failure
        })
        .into()
}

fn run(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Tokenize(args) => tokenize::execute(args),
        Command::Verify(args) => verify::execute(args),
        Command::Reconstruct(args) => reconstruct::execute(args),
        Command::Eval(args) => eval::execute(args),
        Command::Features(args) => features::execute(args),
        Command::Generate(args) => generate::execute(args),
        Command::Inspect(args) => inspect::execute(args),
        Command::Codebook(args) => codebook::execute(args),
        Command::Init(args) => init::execute(args),
        Command::Convert(args) => convert::execute(args),
        Command::Vocab(args) => vocab::execute(args),
        Command::Export(args) => export::execute(args),
        Command::Train(args) => train::execute(args),
        Command::Bench(args) => bench::execute(args),
        Command::Cache(args) => cache::execute(args),
    }
}
