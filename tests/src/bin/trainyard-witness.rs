//! What the jobs of a chaos run start; see the library's `chaos::witness`. For tests only.

fn main() -> std::process::ExitCode {
    trainyard_tests::chaos::witness::main()
}
