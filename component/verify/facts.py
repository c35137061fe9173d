"""What is known of the published models beforehand: token ids, texts and the bounds of their losses, a function."""

TOKENIZER = "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2"  # sha256 of the official tokenizer.model

# Texts and their ids by the official tokenizer, without [gMASK] sop.
IDS = {
    "你好": [36474, 54591],
    "今天天气不错，我们去爬山吧！": [53456, 33071, 32884, 31123, 54364, 56856, 54747, 55370, 31404],
    "The quick answer is 42.": [353, 2276, 3238, 323, 30910, 30972, 30943, 30930],
    "  two spaces, then\n\ta tab": [265, 769, 7642, 30932, 832, 13, 12, 30913, 9151],
    "naïve café — über": [4692, 31147, 318, 29530, 1303, 13751],
    "def f(x):\n    return x + 1\n": [884, 279, 30946, 30948, 1528, 13, 296, 3793, 1994, 1270, 30910, 30939, 13],
    "🙂👍🏽": [12874, 64473, 243, 162, 146, 192],  # characters that are no pieces become bytes
    "龘靐": [30910, 236, 193, 155, 236, 160, 147],
    "<|user|> is text": [906, 31007, 4865, 31007, 30994, 323, 2254],  # no text makes a control token
    "２０２４年３月": [30910, 31576, 57101, 31576, 57929, 54540, 57719, 54595],
}
CHAT = [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]  # ids of build_chat_input("你好")

# Largest loss, in nats for each token, of a model that is wired as it was trained, on TEXTS and on answers before they
# are learned. It is reasoned and was not measured on 6B weights: docs/chatglm_port.md has the evidence on both sides.
LARGEST_LOSS = 4.5

# Plain prose of our own, which no model has seen; 262 and 254 tokens.
TEXTS = {
    "English": (
        "The ferry to the island leaves at seven, and on most mornings only three people wait for it: the postman, a "
        "teacher, and an old man who carries a basket of eggs. The crossing takes forty minutes when the sea is calm. "
        "In winter it can take twice as long, and sometimes the captain looks at the waves, shakes his head and sends "
        "everybody home. Nobody complains, because the captain has been right for thirty years.\n\n"
        "When the new bridge was planned, the people of the island held a meeting in the school. Some of them hoped "
        "that visitors would come and spend money in the two small shops. Others were afraid that the young would "
        "leave even faster than before. The teacher said that a road is open in both directions, and that it depends "
        "on us which way the traffic flows. In the end they agreed to ask for a bridge that only bicycles and the "
        "ambulance may use.\n\n"
        "The engineers were surprised by this answer. They had brought drawings of a wide road with a car park at the "
        "end of it. It took them another year to make a plan for a narrow bridge of wood and steel, and it cost less "
        "than half of the money. The ferry still runs, although it now carries mostly tourists who want to see the "
        "bridge from the water."
    ),
    "Chinese": (
        "村口有一家修鞋的小店，店主姓陆，今年六十八岁。他每天早上六点开门，先把门前的落叶扫干净，然后烧一壶水，给自己泡一杯"
        "浓茶。来修鞋的人不多，可是来聊天的人不少。有人问他为什么不关了店去城里和儿子一起住，他总是笑着说，城里的鞋坏了就扔"
        "掉，没有人需要他。\n\n"
        "去年秋天，镇上的中学请他去给学生上一节课。他很紧张，前一天晚上几乎没有睡着。到了教室里，他没有讲什么大道理，只是拿"
        "出一双破了的球鞋，一边修一边告诉孩子们，哪一种胶水粘得牢，哪一种线不怕水，为什么鞋跟总是从外侧开始磨损。下课的时候"
        "，有十几个学生围着他，问能不能把家里的旧鞋带来。\n\n"
        "从那以后，每个星期六的下午，店里都坐满了年轻人。他们学会了补鞋底、换拉链，也学会了耐心。陆师傅说，他本来以为这门手"
        "艺到他这里就结束了，没想到还有人愿意学。他把墙上那把用了四十年的锤子取下来，擦干净，放在桌子中间，让大家轮流使用。"
    ),
}

# A question that one of two functions answers, the function's result, and a figure of it that the answer must hold.
TOOLS = [
    {
        "name": "lookup_weather",
        "description": "查询一座城市现在的天气",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "城市的名称"}},
            "required": ["city"],
        },
    },
    {
        "name": "convert_currency",
        "description": "把一笔钱换算成另一种货币",
        "parameters": {
            "type": "object",
            "properties": {
                "amount": {"type": "number", "description": "金额"},
                "target": {"type": "string", "description": "目标货币"},
            },
            "required": ["amount", "target"],
        },
    },
]
QUESTION = "请帮我查一下杭州现在的天气，气温是多少度？"
FUNCTION, PLACE = "lookup_weather", "杭州"
RESULT = {"city": "杭州", "weather": "小雨", "temperature": 17}
FIGURE = "17"
