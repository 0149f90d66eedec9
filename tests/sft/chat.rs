//! R5: chat templates.

use firebrick::config::CHAT_TEMPLATES;
use firebrick::data::{Chat, ChatTemplate, SpecialTexts, TemplateError, Tokenizer};
use serde_json::{Value, json};

fn compile(source: &str) -> ChatTemplate {
    ChatTemplate::compile("`test`", source, &SpecialTexts::default()).unwrap()
}

fn render(source: &str, messages: &[Value]) -> Result<String, TemplateError> {
    Ok(compile(source).render(&Chat::new(messages))?.text)
}

fn conversation() -> Vec<Value> {
    vec![
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "Hi"}),
        json!({"role": "assistant", "content": "Hello"}),
        json!({"role": "user", "content": "Bye"}),
        json!({"role": "assistant", "content": "So long"}),
    ]
}

/// The published templates, and what Python's Jinja makes of them.
#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn r5_published_templates_render_byte_equal() {
    let folder = std::env::var("FIREBRICK_DATA").expect("FIREBRICK_DATA");
    let text = std::fs::read_to_string(format!("{folder}/chat-templates/cases.json")).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let messages = file["messages"].as_array().unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 19);
    for case in cases {
        let text = |key: &str| case[key].as_str().unwrap().to_string();
        let special = SpecialTexts {
            bos: text("bos_token"),
            eos: text("eos_token"),
        };
        let template =
            ChatTemplate::compile(&text("name"), &text("template_str"), &special).unwrap();
        let chat = Chat {
            add_generation_prompt: file["add_generation_prompt"] == json!(true),
            ..Chat::new(messages)
        };
        let rendered = template.render(&chat).unwrap().text;
        assert_eq!(rendered, text("python_jinja2_render"), "{}", text("name"));
    }
}

/// Expected texts: Python 3 with Jinja2 3.1 and the filter of transformers.
#[test]
fn r5_tojson_is_pythons() {
    let message = |value: Value| vec![json!({"role": "user", "content": value})];
    let value = json!({"b": [1, 2.0, true, null], "a": {"é\"\n<&'": []}});
    let cases = [
        (
            "tojson",
            r#"{"b": [1, 2.0, true, null], "a": {"é\"\n<&'": []}}"#,
        ),
        (
            "tojson(sort_keys=true, separators=(',', ':'))",
            r#"{"a":{"é\"\n<&'":[]},"b":[1,2.0,true,null]}"#,
        ),
        (
            "tojson(ensure_ascii=true)",
            r#"{"b": [1, 2.0, true, null], "a": {"\u00e9\"\n<&'": []}}"#,
        ),
        (
            "tojson(indent=2)",
            "{\n  \"b\": [\n    1,\n    2.0,\n    true,\n    null\n  ],\n  \"a\": {\n    \"é\\\"\\n<&'\": []\n  }\n}",
        ),
        (
            "tojson(2)",
            "{\n  \"b\": [\n    1,\n    2.0,\n    true,\n    null\n  ],\n  \"a\": {\n    \"é\\\"\\n<&'\": []\n  }\n}",
        ),
    ];
    for (filter, wanted) in cases {
        let source = format!("{{{{ messages[0].content | {filter} }}}}");
        assert_eq!(
            render(&source, &message(value.clone())).unwrap(),
            wanted,
            "{filter}"
        );
    }
}

/// Blanks around `{% generation %}` are those around any other block tag.
#[test]
fn r5_generation_spans_are_exact_to_the_blank() {
    let template = compile(
        "{% for message in messages %}\n  {% if message.role == 'assistant' %}\n    {% generation %}\n{{ message.content }}<end>\n    {% endgeneration %}\n  {% else %}\n[{{ message.content }}]\n  {% endif %}\n{% endfor %}\n",
    );
    assert!(template.marks_generation());
    let rendered = template.render(&Chat::new(&conversation())).unwrap();
    assert_eq!(
        rendered.text,
        "[Be brief.]\n[Hi]\nHello<end>\n[Bye]\nSo long<end>\n"
    );
    let spans: Vec<&str> = rendered
        .generation
        .iter()
        .map(|span| &rendered.text[span.clone()])
        .collect();
    assert_eq!(spans, ["Hello<end>\n", "So long<end>\n"]);

    let tight = compile("a \n {%- generation -%} \n b {%- endgeneration +%}\nc");
    let rendered = tight.render(&Chat::new(&[])).unwrap();
    assert_eq!(rendered.text, "ab\nc");
    assert_eq!(rendered.generation.first(), Some(&(1..2)));
}

#[test]
fn r5_python_methods_slices_and_loop_controls_work() {
    let cases = [
        ("{{ messages[0].content.strip().upper() }}", "HI THERE"),
        ("{{ messages[0].content.split('T')[-1] }}", " Hi there "),
        ("{{ messages[0]['content'].startswith(' Hi') }}", "True"),
        ("{{ messages[0].get('name', 'nobody') }}", "nobody"),
        (
            "{% for k, v in messages[0].items() %}{{ k }};{% endfor %}",
            "role;content;",
        ),
        (
            "{% for m in messages[::-1] %}{{ loop.index }}{% endfor %}",
            "1",
        ),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "01",
        ),
        ("{% if tools is none %}none{% endif %}", "none"),
        (
            "{% if tools is defined and not documents %}yes{% endif %}",
            "yes",
        ),
        ("{{ '<b>' ~ messages[0].content | trim }}", "<b>Hi there"),
        (
            "{%- set ns = namespace(x=1) -%}{% set ns.x = 2 %}{{ ns.x }}\n",
            "2",
        ),
    ];
    let messages = [json!({"role": "user", "content": " Hi there "})];
    for (source, wanted) in cases {
        assert_eq!(render(source, &messages).unwrap(), wanted, "{source}");
    }
    assert_eq!(render("{{ strftime_now('%Y') }}", &[]).unwrap().len(), 4);
}

#[test]
fn r5_named_templates_compile_and_begin_alike_with_fewer_messages() {
    let special = SpecialTexts {
        bos: "<s>".to_string(),
        eos: "</s>".to_string(),
    };
    for name in CHAT_TEMPLATES {
        let template = ChatTemplate::named(name, &special).unwrap();
        let messages = conversation();
        let text = |count: usize, prompt: bool| {
            let chat = Chat {
                add_generation_prompt: prompt,
                ..Chat::new(&messages[..count])
            };
            template.render(&chat).unwrap().text
        };
        let whole = text(5, false);
        assert!(whole.matches("<s>").count() <= 1, "{name}: {whole}");
        for content in ["Be brief.", "Hi", "Hello", "Bye", "So long"] {
            assert!(whole.contains(content), "{name}: {whole}");
        }
        for count in [2, 4] {
            assert!(whole.starts_with(&text(count, true)), "{name}");
            assert!(whole.starts_with(&text(count + 1, false)), "{name}");
            let before = text(count, true);
            assert!(before.len() < text(count + 1, false).len(), "{name}");
        }
    }
    let unknown = ChatTemplate::named("chatmll", &special).unwrap_err();
    assert!(unknown.help().unwrap().contains("chatml"));
}

/// The texts that the models' own documentation shows.
#[test]
fn r5_named_templates_are_the_published_formats() {
    let special = SpecialTexts {
        bos: "<s>".to_string(),
        eos: "</s>".to_string(),
    };
    let messages = [
        json!({"role": "system", "content": "S"}),
        json!({"role": "user", "content": "U"}),
        json!({"role": "assistant", "content": "A"}),
    ];
    let cases = [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
        ),
        ("mistral", "<s>[INST] S\n\nU [/INST] A</s>"),
        (
            "zephyr",
            "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n",
        ),
        (
            "gemma",
            "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n",
        ),
        (
            "phi3",
            "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n",
        ),
        ("vicuna", "S\n\nUSER: U\nASSISTANT: A</s>\n"),
        (
            "alpaca",
            "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n",
        ),
    ];
    for (name, wanted) in cases {
        let template = ChatTemplate::named(name, &special).unwrap();
        assert_eq!(
            template.render(&Chat::new(&messages)).unwrap().text,
            wanted,
            "{name}"
        );
    }
}

#[test]
fn r5_chatml_writes_tools_and_calls() {
    let tools = json!([{"type": "function", "function": {"name": "add"}}]);
    let messages = [
        json!({"role": "user", "content": "1+1?"}),
        json!({"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}},
        ]}),
        json!({"role": "tool", "content": "2"}),
        json!({"role": "assistant", "content": "Two"}),
    ];
    let template = ChatTemplate::named("chatml", &SpecialTexts::default()).unwrap();
    let chat = Chat {
        tools: Some(&tools),
        ..Chat::new(&messages)
    };
    let text = template.render(&chat).unwrap().text;
    assert!(text.starts_with("<|im_start|>system\n# Tools"), "{text}");
    assert!(
        text.contains("\n{\"type\": \"function\", \"function\": {\"name\": \"add\"}}\n</tools>")
    );
    assert!(text.ends_with(
        "<|im_start|>assistant\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 1}}\n</tool_call><|im_end|>\n\
         <|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n"
    ), "{text}");
}

#[test]
fn r5_what_a_template_says_is_said() {
    let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "chat template `test` refuses these messages: roles must alternate"
    );
    let error = render(
        "\n\n{{ messages[0].content.nothing.more }}",
        &conversation(),
    )
    .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("chat template `test`, line 3: "),
        "{error}"
    );
    let error = ChatTemplate::compile("`x`", "a\n{% for %}", &SpecialTexts::default()).unwrap_err();
    assert!(
        error.to_string().starts_with("chat template `x`, line 2: "),
        "{error}"
    );
}

#[test]
fn r5_hostile_templates_end() {
    let endless = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}",
    ];
    for source in endless {
        render(source, &[]).unwrap_err();
    }
    assert_eq!(
        render(endless[0], &[]).unwrap_err(),
        TemplateError::Endless {
            template: "`test`".to_string()
        }
    );
    let nested = "{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}";
    assert!(matches!(
        render(nested, &[]).unwrap_err(),
        TemplateError::Nested { .. }
    ));
    let marker = [json!({"role": "user", "content": [{"text": "\u{fdd0}"}]})];
    let marks = "{% generation %}x{% endgeneration %}";
    assert!(matches!(
        render(marks, &marker).unwrap_err(),
        TemplateError::Marker { .. }
    ));
    assert_eq!(
        render("{{ messages[0].content[0].text }}", &marker).unwrap(),
        "\u{fdd0}"
    );
}

#[test]
fn r5_a_tokenizer_brings_its_template_and_takes_another() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    Tokenizer::bytes().unwrap().save(folder.path()).unwrap();
    let load = || Tokenizer::from_file(&path("tokenizer.json")).unwrap();
    let find = |choice: &str| ChatTemplate::find(choice, &load());
    assert_eq!(
        find("tokenizer").unwrap_err(),
        TemplateError::NoneInTokenizer
    );

    let config = json!({"chat_template": [
        {"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"},
    ]});
    std::fs::write(path("tokenizer_config.json"), config.to_string()).unwrap();
    assert_eq!(find("tokenizer").unwrap().source(), "one");
    assert_eq!(find("tokenizer:tool_use").unwrap().source(), "two");
    let error = find("tokenizer:rag").unwrap_err();
    assert!(
        error.to_string().contains("it has: default, tool_use"),
        "{error}"
    );

    std::fs::write(path("chat_template.jinja"), "three").unwrap();
    assert_eq!(find("tokenizer").unwrap().source(), "three");
    let file = path("chat_template.jinja");
    assert_eq!(find(file.to_str().unwrap()).unwrap().source(), "three");
    assert!(matches!(
        find("nowhere.jinja").unwrap_err(),
        TemplateError::Unreadable { .. }
    ));

    let mut tokenizer = load();
    tokenizer.set_chat_template("four");
    let saved = tempfile::tempdir().unwrap();
    tokenizer.save(saved.path()).unwrap();
    let again = Tokenizer::from_file(&saved.path().join("tokenizer.json")).unwrap();
    assert_eq!(again.chat_template("default").unwrap(), "four");
    let config = std::fs::read_to_string(saved.path().join("tokenizer_config.json")).unwrap();
    assert!(!config.contains("chat_template"), "{config}");
}

#[test]
fn r5_the_end_of_a_turn_is_read_off_the_template() {
    let special = SpecialTexts {
        bos: "<s>".to_string(),
        eos: "</s>".to_string(),
    };
    let ends = [
        ("chatml", Some("<|im_end|>")),
        ("llama3", Some("<|eot_id|>")),
        ("mistral", Some("</s>")),
        ("zephyr", Some("</s>")),
        ("gemma", Some("<end_of_turn>")),
        ("phi3", Some("<|end|>")),
        ("vicuna", Some("</s>")),
        ("alpaca", Some("</s>")),
    ];
    assert_eq!(ends.map(|(name, _)| name), CHAT_TEMPLATES);
    for (name, end) in ends {
        let template = ChatTemplate::named(name, &special).unwrap();
        assert_eq!(template.turn_end().as_deref(), end, "{name}");
    }
    assert_eq!(
        compile("{% for m in messages %}{{ m.content }}{% endfor %}").turn_end(),
        None
    );
    assert_eq!(compile("{{ raise_exception('no') }}").turn_end(), None);
}
