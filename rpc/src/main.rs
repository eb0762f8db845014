//! The binary `ferry`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    ferry_rpc::cli::main()
}
