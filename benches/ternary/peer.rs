//! Another implementation, in a process of its own: requests go to its standard input, seconds come back.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

pub struct Peer {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    pub fn start(command: &str) -> Self {
        let mut words = command.split_whitespace();
        let program = words.next().expect("--peer names a program");
        let mut child = Command::new(program)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the peer starts");
        Self {
            requests: child.stdin.take(),
            answers: BufReader::new(child.stdout.take().expect("it is piped")),
            child,
        }
    }

    /// Seconds of each of some calls, which go through so many matrices in turn.
    pub fn seconds(&mut self, shape: [usize; 3], matrices: usize, calls: usize) -> Vec<f64> {
        let [size, tokens, threads] = shape;
        let request = json!({
            "size": size, "tokens": tokens, "threads": threads, "matrices": matrices, "calls": calls,
        });
        let pipe = self.requests.as_mut().expect("it is open until the end");
        writeln!(pipe, "{request}").expect("the peer listens");
        let mut answer = String::new();
        self.answers
            .read_line(&mut answer)
            .expect("the peer answers");
        let answer: Value = serde_json::from_str(&answer).expect("the peer answers in JSON");
        let seconds = answer["seconds"].as_array().expect("it answers seconds");
        seconds.iter().filter_map(Value::as_f64).collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The end of its input is the end of the peer.
        self.requests = None;
        if let Err(error) = self.child.wait() {
            eprintln!("the peer: {error}");
        }
    }
}
